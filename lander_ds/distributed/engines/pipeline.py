"""Topology pipeline: the decoder cut into pipeline stages; ZeRO-1 shards optimizer states over the ranks of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from deepspeed.runtime.pipe.schedule import InferenceSchedule, TrainSchedule
from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state
from torch import nn

from lander_ds.data.batching.packing import PackedBatch
from lander_ds.distributed import accelerator
from lander_ds.distributed.engines.deepspeed_internals import (
    PipelineStageEngine,
    PipelineStageModule,
    allocate_zero1,
    zero1_masters,
)
from lander_ds.distributed.engines.engine import Engine, preserved_buffers
from lander_ds.distributed.engines.figures import Figures, RankBytes, bytes_of, optimizer_bytes
from lander_ds.models.loading import Placement
from lander_ds.models.translation_model import BatchTotals, GateStatistics, TranslationModel


class Pipeline(Engine):
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
    def placement(self) -> Placement:
        """Moves a unit to this rank's device."""
        return _to_device

    @property
    def reads_weights(self) -> bool:
        """Every rank reads its span."""
        return True

    def _wrap(self, model: TranslationModel, optimizer: torch.optim.Optimizer | None) -> PipelineStageEngine:
        self._module.hold(model)
        with preserved_buffers(self._module):
            return self._pipeline_stage_engine(optimizer)

    def _pipeline_stage_engine(self, optimizer: torch.optim.Optimizer | None) -> PipelineStageEngine:
        # ZeRO-1 has nothing to do, and refuses to start, where nothing is trained.
        zero_stage = 0 if optimizer is None else 1
        zero = {**self._config["zero_optimization"], "stage": zero_stage}
        return PipelineStageEngine(self._module, {**self._config, "zero_optimization": zero}, optimizer)

    def _allocate(self) -> None:
        allocate_zero1(self._engine.optimizer)

    def _masters(self) -> Iterator[tuple[str, torch.Tensor]]:
        optimizer = self._engine.optimizer
        names = [group["name"] for group in optimizer.optimizer.param_groups]
        return zip(names, zero1_masters(optimizer), strict=True)

    def _set_state(self, parameter: nn.Parameter, value: torch.Tensor, moment: str | None) -> None:
        if moment is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, moment)

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

    def rank_bytes(self) -> RankBytes:
        """The span's weights and gradients; this rank's float32 masters and moments."""
        weights = bytes_of(self.model.parameters())
        if not self._trains:
            return RankBytes(weights, 0, 0)
        optimizer = self._engine.optimizer
        optimizer_memory = optimizer_bytes(optimizer.optimizer, zero1_masters(optimizer))
        return RankBytes(weights, self._engine.gradient_bytes, optimizer_memory)

    def destroy(self) -> None:
        """Let go of DeepSpeed's state and process groups."""
        self._engine.close()


def _to_device(unit: nn.Module) -> None:
    unit.to(accelerator.device())
