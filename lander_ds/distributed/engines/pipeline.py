"""Topology pipeline: the decoder cut into pipeline stages; ZeRO-1 shards optimizer states over the ranks of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.runtime.pipe.schedule import InferenceSchedule, TrainSchedule

from lander_ds.data.batching.packing import PackedBatch
from lander_ds.distributed.engines.deepspeed_internals import (
    PipelineStageEngine,
    PipelineStageModule,
)
from lander_ds.distributed.engines.engine import preserved_buffers
from lander_ds.distributed.engines.figures import Figures
from lander_ds.distributed.engines.replicated import WholeState
from lander_ds.models.translation_model import BatchTotals, GateStatistics, TranslationModel


class Pipeline(WholeState):
    """Pipeline stages with ZeRO-1."""

    _engine: PipelineStageEngine

    def __init__(self, config: dict[str, Any], pipeline_stages: int) -> None:
        """Set up the process grid.

        Args:
            config: resolved DeepSpeed configuration.
            pipeline_stages: ranks are a multiple.
        """
        super().__init__(config)
        self._module = PipelineStageModule(pipeline_stages)

    @property
    def reads_weights(self) -> bool:
        """Every rank reads its span."""
        return True

    def _wrap(self, model: TranslationModel, optimizer: torch.optim.Optimizer | None) -> PipelineStageEngine:
        self._module.hold(model)
        with preserved_buffers(self._module):
            return self._pipeline_stage_engine(optimizer)

    def _pipeline_stage_engine(self, optimizer: torch.optim.Optimizer | None) -> PipelineStageEngine:
        return PipelineStageEngine(self._module, self._zero1_config(optimizer), optimizer)

    def train_step(
        self,
        batches: Sequence[PackedBatch],
        totals: BatchTotals,
        alpha: float = 0.0,
        gates: GateStatistics | None = None,
    ) -> Figures:
        """One optimizer step: every micro-batch forward and backward through all pipeline stages (1F1B)."""
        self._module.train()
        # DeepSpeed averages gradients over data-parallel ranks; the loss is normalised over all of them already.
        scale = self._engine.dp_world_size
        return self._engine.run(TrainSchedule, batches, totals, scale, alpha=alpha, gates=gates)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[PackedBatch], totals: BatchTotals) -> Figures:
        """Forward passes alone."""
        self._module.eval()
        return self._engine.run(InferenceSchedule, batches, totals)

    def differentiate(self, batches: Sequence[PackedBatch], totals: BatchTotals) -> None:
        """Forward and backward passes without optimizer."""
        self._module.eval()
        self._engine.run(TrainSchedule, batches, totals)

    def destroy(self) -> None:
        """Let go of DeepSpeed's state and process groups."""
        self._engine.close()
