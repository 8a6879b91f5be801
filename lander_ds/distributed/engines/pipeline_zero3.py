"""Topology pipeline_zero3: every pipeline stage shards all its parameters over its own ranks with ZeRO-3, or frozen ones
over those on a node."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from lander_ds.config.recipe import FrozenShards
from lander_ds.distributed.engines.deepspeed_internals import PipelineStageEngine, Zero3PipelineStageEngine
from lander_ds.distributed.engines.pipeline import Pipeline
from lander_ds.distributed.engines.zero3 import ShardedState, sharding
from lander_ds.distributed.nodes import node_group
from lander_ds.models.loading import Placement


class PipelineZero3(ShardedState, Pipeline):
    """Pipeline stages with ZeRO-3."""

    def __init__(
        self, config: dict[str, Any], pipeline_stages: int, frozen_shards: FrozenShards = "world"
    ) -> None:
        """Set up the process grid.

        Args:
            config: resolved DeepSpeed configuration.
            pipeline_stages: ranks are a multiple.
            frozen_shards: over which ranks of a stage frozen weights are sharded.
        """
        super().__init__(config, pipeline_stages)
        self._node = node_group(self._module.mpu().get_stage_id()) if frozen_shards == "node" else None

    @property
    def placement(self) -> Placement:
        """Shards a unit over the ranks of this pipeline stage; what is frozen perhaps over those of this node."""
        return sharding(self._config, self._node, self._module.mpu())

    @property
    def reads_weights(self) -> bool:
        """One rank of every pipeline stage, or one on every node of it, reads and hands out."""
        return dist.get_rank(self._node or self._module.mpu().get_data_parallel_group()) == 0

    def _pipeline_stage_engine(self, optimizer: torch.optim.Optimizer | None) -> PipelineStageEngine:
        return Zero3PipelineStageEngine(self._module, self._config, optimizer)
