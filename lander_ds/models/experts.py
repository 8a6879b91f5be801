"""Mixtures of experts: the FFN of a token is the weighted sum of a few experts' FFNs, chosen by the model's own router.

transformers stacks the weights of all experts in three dimensions. Here they lie as one FFN of E f neurons, a neuron being
(expert, unit), so that everything that works on rows and columns of a projection works on experts: awareness, banks,
surgery, exports. Only the experts that a token was sent to are computed.

This module needs torch and transformers alone: routed exports carry a copy of it.

Shapes: T tokens, k choices per token, R = T k rows, E experts, f neurons per expert, d hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from .joined import Owned, Part, Run, joined_linear


@dataclass(frozen=True, eq=False)
class Dispatch:
    """Which rows go to which expert. Rows are sorted by expert, within an expert by token."""

    choices: int
    """k."""
    tokens: torch.Tensor
    """[R] int64: the token of each row."""
    order: torch.Tensor
    """[R] int64: which of the T k choices, counted token by token, each row is."""
    counts: tuple[int, ...]
    """Rows per expert."""

    @staticmethod
    def of(chosen: torch.Tensor, experts: int) -> Dispatch:
        """That of the experts chosen for each token, [T, k] int64. The host waits for the device here, as it does in
        transformers: how many rows an expert has is a shape."""
        flat, choices = chosen.reshape(-1), chosen.shape[-1]
        order = flat.argsort(stable=True)
        if isinstance(chosen, FakeTensor) or chosen.is_meta:
            # Without values, where memory is predicted: every expert gets its share.
            counts = [len(flat) * (e + 1) // experts - len(flat) * e // experts for e in range(experts)]
        else:
            counts = torch.bincount(flat, minlength=experts).tolist()
        return Dispatch(choices, order // choices, order, tuple(counts))

    def rows(self) -> Iterator[tuple[int, slice]]:
        """Experts that have rows, and where they are; without a row at all, the first."""
        for expert, (begin, end) in enumerate(pairwise((0, *accumulate(self.counts)))):
            if end > begin or (expert == 0 and not sum(self.counts)):
                yield expert, slice(begin, end)

    def combined(self, outputs: torch.Tensor, weights: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The sum of the experts' outputs: rows [R, d], and the router's weights [T, k] -> [T, d], in the type of `like`."""
        weighted = outputs * weights.reshape(-1)[self.order].unsqueeze(-1)
        return torch.zeros_like(like).index_add(0, self.tokens, weighted.to(like.dtype))


class ExpertLinear(nn.Module):
    """A projection of all experts. It is no `nn.Linear`, so that nobody takes it for one that maps every token."""

    bias = None

    def __init__(self, weight: nn.Parameter, experts: int, dim: int) -> None:
        """Take the weight over: [E f, d] (`dim` 0), or [d, E f] (`dim` 1)."""
        super().__init__()
        self.weight, self.experts, self.dim = weight, experts, dim
        self.out_features, self.in_features = weight.shape

    def forward(self, x: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        """Rows [R, d] -> [R, f] (`dim` 0), or [R, f] -> [R, d] (`dim` 1)."""
        f = self.weight.shape[self.dim] // self.experts
        run = Run("frozen", 1, 0, f, None)
        parts = [Part((run,), rows, (slice(e * f, (e + 1) * f),)) for e, rows in dispatch.rows()]
        return joined_linear(x, Owned(tuple(parts), (None,) * len(parts)), self.dim, [self.weight])


class Experts(nn.Module):
    """Gated FFNs of E experts."""

    def __init__(
        self,
        gate: torch.Tensor,
        up: torch.Tensor,
        down: torch.Tensor,
        activation: nn.Module,
        experts: int,
        choices: int,
        trained: bool = False,
    ) -> None:
        """Take the weights over.

        Args:
            gate, up: [E f, d].
            down: [d, E f].
            activation: the non-linearity.
            experts: E.
            choices: k.
            trained: whether the weights need gradients.
        """
        super().__init__()
        self.experts, self.choices = experts, choices
        self.gate_proj = ExpertLinear(nn.Parameter(gate, trained), experts, 0)
        self.up_proj = ExpertLinear(nn.Parameter(up, trained), experts, 0)
        self.down_proj = ExpertLinear(nn.Parameter(down, trained), experts, 1)
        self.act_fn = activation

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """[T, d], the experts chosen for each token [T, k], and their weights [T, k] -> [T, d]."""
        dispatch = Dispatch.of(chosen, self.experts)
        rows = x[dispatch.tokens]
        h = self.act_fn(self.gate_proj(rows, dispatch)) * self.up_proj(rows, dispatch)
        return dispatch.combined(self.down_proj(h, dispatch), weights, x)


def unstack(model: PreTrainedModel) -> None:
    """Put `Experts` in place of transformers' stacked experts (`gate_up_proj` [E, 2 f, d], `down_proj` [E, d, f]), on
    whatever device they are, meta included."""
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            stacked, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
            if isinstance(stacked, nn.Parameter) and isinstance(down, nn.Parameter) and stacked.dim() == 3:
                experts, d, f = down.shape
                gate, up = (part.reshape(experts * f, d) for part in torch.split(stacked.detach(), f, dim=1))
                columns = down.detach().permute(1, 0, 2).reshape(d, experts * f)
                activation = module.act_fn
                assert isinstance(activation, nn.Module)
                choices = model.config.num_experts_per_tok
                plain = Experts(gate, up, columns, activation, experts, choices, stacked.requires_grad)
                setattr(parent, name, plain.train(module.training))


def sizes_by_expert(neurons: Sequence[int] | torch.Tensor, units: int, experts: int) -> tuple[int, ...]:
    """How many of these neurons each expert has; `units`: f."""
    return tuple(torch.bincount(torch.as_tensor(neurons) // units, minlength=experts).tolist())
