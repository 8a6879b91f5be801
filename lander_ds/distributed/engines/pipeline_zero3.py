"""Topology pipeline_zero3: every pipeline stage shards all its parameters over its own ranks with ZeRO-3."""

from __future__ import annotations

import torch
import torch.distributed as dist

from lander_ds.distributed.engines.deepspeed_internals import PipelineStageEngine, Zero3PipelineStageEngine
from lander_ds.distributed.engines.pipeline import Pipeline
from lander_ds.distributed.engines.zero3 import ShardedState, sharding
from lander_ds.models.loading import Placement


class PipelineZero3(ShardedState, Pipeline):
    """Pipeline stages with ZeRO-3."""

    @property
    def placement(self) -> Placement:
        """Shards a unit over the ranks of this pipeline stage."""
        return sharding(self._config, self._module.mpu())

    @property
    def reads_weights(self) -> bool:
        """One rank of every pipeline stage reads and hands out."""
        return dist.get_rank(self._module.mpu().get_data_parallel_group()) == 0

    def _pipeline_stage_engine(self, optimizer: torch.optim.Optimizer | None) -> PipelineStageEngine:
        return Zero3PipelineStageEngine(self._module, self._config, optimizer)
