"""Topology replicated: every rank holds the whole model; ZeRO-1 shards the optimizer state of what is trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state
from torch import nn

from lander_ds.distributed import accelerator, process_group
from lander_ds.distributed.engines.deepspeed_internals import ReplicatedEngine, allocate_zero1, zero1_masters
from lander_ds.distributed.engines.engine import Engine, preserved_buffers
from lander_ds.distributed.engines.figures import RankBytes, bytes_of, optimizer_bytes
from lander_ds.distributed.engines.single_span import SingleSpan
from lander_ds.models.loading import Placement
from lander_ds.models.translation_model import TranslationModel


class WholeState(Engine):
    """Mixin of engines whose ranks hold their span whole, with an optimizer state that ZeRO-1 shards."""

    @property
    def placement(self) -> Placement:
        """Moves a unit to this rank's device."""
        return _to_device

    def _zero1_config(self, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
        """The configuration for what this rank trains: ZeRO-1 refuses to start where that is nothing."""
        zero = {**self._config["zero_optimization"], "stage": 0 if optimizer is None else 1}
        return {**self._config, "zero_optimization": zero}

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

    def rank_bytes(self) -> RankBytes:
        """The span's weights and gradients; this rank's float32 masters and moments."""
        weights = bytes_of(self.model.parameters())
        if not self._trains:
            return RankBytes(weights, 0, 0)
        optimizer = self._engine.optimizer
        optimizer_memory = optimizer_bytes(optimizer.optimizer, zero1_masters(optimizer))
        return RankBytes(weights, self._engine.gradient_bytes, optimizer_memory)


class Replicated(WholeState, SingleSpan):
    """DeepSpeed's engine under ZeRO-1: frozen weights never travel."""

    @property
    def reads_weights(self) -> bool:
        """One rank reads; DeepSpeed hands out whole parameters when it takes the model over."""
        return process_group.rank() == 0

    def _wrap(self, model: TranslationModel, optimizer: torch.optim.Optimizer | None) -> ReplicatedEngine:
        with preserved_buffers(model):
            return ReplicatedEngine(model, self._zero1_config(optimizer), optimizer)


def _to_device(unit: nn.Module) -> None:
    unit.to(accelerator.device())
