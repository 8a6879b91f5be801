"""What the stages see of a topology: micro-batches in, figures out. One implementation per topology beside this file."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lander_ds.data.batching.packing import PackedBatch
from lander_ds.models.loading import Placement
from lander_ds.models.translation_model import BatchTotals, TranslationModel

MakeModel = Callable[[Placement], TranslationModel]
"""Fills this rank's span of the model, handing every unit to `place` once it is read, and wraps it."""
MakeOptimizer = Callable[[], torch.optim.Optimizer | None]
"""The optimizer of what this rank's span trains; None when that is nothing."""


@dataclass(frozen=True)
class Figures:
    """What this rank computed of a global batch; the sum over all ranks is that of the batch."""

    per_pair: torch.Tensor
    """[2, M] float64: sum of losses (nats) and target tokens per pair."""
    budget: torch.Tensor
    """[] float64: budget loss, before its weight."""


@dataclass(frozen=True)
class RankBytes:
    """Bytes that one rank holds, summed over real tensors."""

    weights: int
    gradients: int
    optimizer: int


MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state per parameter."""


class Engine(ABC):
    """A model spread over the ranks. All methods but the properties are collective."""

    model: TranslationModel
    """This rank's span."""
    monitor: Any
    """DeepSpeed's monitor (TensorBoard)."""
    _engine: Any
    """DeepSpeed's engine."""
    _trains: bool
    """Whether there is an optimizer on this rank."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups on this rank; empty when it trains nothing."""
        optimizer = self._optimizer
        return [] if optimizer is None else optimizer.param_groups

    @property
    def grad_norm(self) -> float:
        """Norm of the whole model's gradient in the last step, before clipping."""
        norm = self._engine.get_global_grad_norm()
        return 0.0 if norm is None else float(norm)

    @abstractmethod
    def train_step(self, batches: Sequence[PackedBatch], norm: BatchTotals) -> Figures:
        """One optimizer step over this data-parallel rank's micro-batches."""

    @abstractmethod
    def evaluate(self, batches: Sequence[PackedBatch], norm: BatchTotals) -> Figures:
        """Forward passes alone, in evaluation mode."""

    @abstractmethod
    def differentiate(self, batches: Sequence[PackedBatch], norm: BatchTotals) -> None:
        """Forward and backward passes of an engine without optimizer, in evaluation mode (detection)."""

    @abstractmethod
    def rank_bytes(self) -> RankBytes:
        """What this rank holds: weights (its shard of them); gradients; float32 masters and moments."""

    def destroy(self) -> None:
        """Let go of DeepSpeed's state."""
        self._engine.destroy()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters of this rank's span under their names in the whole model, tied ones once."""
        own = {id(parameter) for parameter in self.model.parameters()}
        for name, parameter in self.model.model.named_parameters():
            if id(parameter) in own:
                yield name, parameter

    @abstractmethod
    def _masters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Group name and this rank's flat float32 masters, in all parts that the optimizer holds them in."""

    @property
    def _optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer inside DeepSpeed's; None when this rank trains nothing."""
        return self._engine.optimizer.optimizer if self._trains else None

    @abstractmethod
    def _set_state(self, parameter: nn.Parameter, value: torch.Tensor, moment: str | None) -> None:
        """Put a whole float32 tensor into this rank's part of the masters (`moment` None) or of a moment."""

    def group_steps(self) -> dict[str, int]:
        """Optimizer steps that each group of this rank has taken (groups are skipped where no pair owns them)."""
        optimizer = self._optimizer
        if optimizer is None:
            return {}
        states = ((name, optimizer.state[part]) for name, part in self._masters())
        return {name: int(state["step"]) for name, state in states if "step" in state}

    def state_tensors(self, mine: Callable[[int], bool]) -> Iterator[tuple[str, str | None, torch.Tensor]]:
        """Whole float32 masters and moments of the trained parameters of this span: name, moment or None, tensor in
        host memory (collective among the ranks that share the span).

        Args:
            mine: number of a parameter -> whether this rank wants it; the others are only taken part in.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        optimizer = self._optimizer
        moments = MOMENTS if optimizer is not None and "betas" in optimizer.defaults else ()
        trained = [
            (name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad
        ]
        for number, (name, parameter) in enumerate(trained):
            for moment in (None, *moments):
                if moment is None:
                    whole = safe_get_full_fp32_param(parameter)
                else:
                    whole = safe_get_full_optimizer_state(parameter, moment)
                if mine(number):
                    yield name, moment, whole.to("cpu", copy=True)

    def restore(
        self,
        masters: Mapping[str, torch.Tensor],
        moments: Mapping[str, torch.Tensor],
        steps: Mapping[str, int],
    ) -> None:
        """Take over the optimizer's state; the weights themselves were filled with the masters already.

        Args:
            masters: name -> whole float32 tensor.
            moments: `exp_avg/NAME`, `exp_avg_sq/NAME` -> the same; empty for optimizers without.
            steps: group -> optimizer steps it has taken.
        """
        optimizer = self._optimizer
        if optimizer is None:
            return
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                self._set_state(parameter, masters[name], None)
                for moment in MOMENTS if moments else ():
                    self._set_state(parameter, moments[f"{moment}/{name}"], moment)
        for group, part in self._masters():
            state = optimizer.state[part]
            if "step" in state:
                like = state["step"]
                state["step"] = like.fill_(steps[group]) if isinstance(like, torch.Tensor) else steps[group]

    def frozen_digest(self) -> str:
        """Digest of this rank's share of every frozen parameter (hex). Equal digests: bitwise equal shares."""
        digest = hashlib.blake2b()
        for name, parameter in sorted(self.named_parameters(), key=lambda item: item[0]):
            if not parameter.requires_grad:
                digest.update(name.encode())
                digest.update(_raw(held(parameter)))
        return digest.hexdigest()


def held(parameter: nn.Parameter) -> torch.Tensor:
    """What this rank holds of a parameter: its shard under ZeRO-3, else all of it."""
    shard: torch.Tensor = getattr(parameter, "ds_tensor", parameter)
    return shard


def bytes_of(tensors: Iterable[torch.Tensor | None]) -> int:
    """Sum of the sizes of tensors in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def optimizer_bytes(optimizer: torch.optim.Optimizer, masters: Iterable[torch.Tensor]) -> int:
    """Bytes of float32 masters and moments (step counts left out)."""
    moments = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.dim() > 0
    ]
    return bytes_of(masters) + bytes_of(moments)


@contextmanager
def kept_buffers(module: nn.Module) -> Iterator[None]:
    """Within this context buffers may change their type; afterwards they have the old one again.

    DeepSpeed would turn rotary frequencies into bfloat16, which moves far positions.
    """
    kept = [
        (part, name, buffer.clone())
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None
    ]
    yield
    for part, name, buffer in kept:
        current = part._buffers[name]
        assert current is not None
        part._buffers[name] = buffer.to(current.device)


def _raw(tensor: torch.Tensor) -> Any:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data
