"""What engines report of a step, and of the memory they hold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from lander_ds.distributed import accelerator
from lander_ds.models.translation_model import TranslationModel


@dataclass(frozen=True)
class Figures:
    """What this rank computed of a global batch; the sum over all ranks is that of the batch."""

    per_pair: torch.Tensor
    """[R, M + 1] float64 on this rank's device: losses (nats) and target tokens per pair, and of texts without one, and
    what else `TranslationModel.forward` adds up."""
    budget: torch.Tensor
    """[] float64, there too: budget loss, before its weight."""

    @classmethod
    def nothing(cls, model: TranslationModel) -> Figures:
        """Those of no micro-batch."""
        per_pair = torch.zeros(
            model.figures, model.pairs + 1, dtype=torch.float64, device=accelerator.device()
        )
        return cls(per_pair, per_pair.new_zeros(()))

    def add(self, per_pair: torch.Tensor, budget: torch.Tensor) -> None:
        """Count a micro-batch; nothing waits for the device."""
        self.per_pair.add_(per_pair)
        self.budget.add_(budget)


@dataclass(frozen=True)
class RankBytes:
    """Bytes that one rank holds, summed over real tensors."""

    weights: int
    gradients: int
    optimizer: int


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
