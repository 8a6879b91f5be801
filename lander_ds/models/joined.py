"""Products with the weights of all banks side by side, forward and backward.

The sum over banks is the sum over neurons, so one product per projection does for all of them, however many pairs there
are. Which neurons a token owns is a mask: the weight gradient of a neuron comes from the tokens that own it alone.

A mixture of experts does the same per expert: its rows of x are sorted by expert, and each expert (a `Part`) has its own
neurons of every bank.

This module needs torch alone: routed exports carry a copy of it.

Shapes: R rows (tokens; with experts one per choice of a token), d hidden width, n neurons of one bank, f neurons of all (of
one expert, where there are some), M pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class Run:
    """Neurons of neighbouring banks that are treated alike, in the order of the joined banks. How many runs there are does
    not depend on the number of pairs."""

    kind: str
    """Of the banks: general, specific or frozen."""
    banks: int
    """How many."""
    begin: int
    end: int
    """Neurons `begin` to `end` (not included) of all."""
    owners: torch.Tensor | None
    """[M + 1, end - begin] bool: whether a pair owns a neuron. The last row is of padding (id -1), which owns none. None
    where all pairs own all of them, or none owns any."""

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """The run's columns of values [R, f]."""
        return values[:, self.begin : self.end]


def runs_of(
    banks: Sequence[tuple[str, tuple[int, ...]]], sizes: Sequence[int], pairs: int, device: torch.device
) -> tuple[Run, ...]:
    """The runs of banks.

    Args:
        banks: kind and owners (pair ids) of each.
        sizes: n of each.
        pairs: M.
        device: of the tables.
    """

    def partly_owned(kind: str, owners: tuple[int, ...]) -> bool:
        # Tokens of no pair own general banks, but not a single pair's specific ones.
        return kind == "specific" or 0 < len(owners) < pairs

    runs, begin, first = [], 0, 0
    for (kind, partly), members in groupby(banks, lambda bank: (bank[0], partly_owned(*bank))):
        group = list(members)
        own = sizes[first : first + len(group)]
        owners = None
        if partly:
            rows = [[pair in owning for _, owning in group] for pair in range(pairs)]
            table = torch.tensor([*rows, [False] * len(group)])
            spread = table.repeat_interleave(torch.tensor(own), dim=1, output_size=sum(own))
            owners = spread.to(device)
        runs.append(Run(kind, len(group), begin, begin + sum(own), owners))
        begin, first = begin + sum(own), first + len(group)
    return tuple(runs)


@dataclass(frozen=True, eq=False)
class Part:
    """What is multiplied together. A plain FFN is one part: all rows, all neurons of every bank."""

    runs: tuple[Run, ...]
    rows: slice | None = None
    """An expert's rows."""
    neurons: tuple[slice, ...] | None = None
    """An expert's neurons of every bank."""

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """The part's rows of values [R, ...]."""
        return values if self.rows is None else values[self.rows]

    def cut(self, weights: Sequence[torch.Tensor], dim: int) -> Sequence[torch.Tensor]:
        """The part's neurons of the banks' weights."""
        if self.neurons is None:
            return weights
        return [_narrow(one, dim, own) for one, own in zip(weights, self.neurons, strict=True)]

    def size(self, bank: int, shape: torch.Size, dim: int) -> int:
        """How many of a bank's neurons are the part's; `shape` is that of the bank's weights."""
        own = None if self.neurons is None else self.neurons[bank]
        return shape[dim] if own is None else int(own.stop - own.start)


@dataclass(frozen=True, eq=False)
class Owned:
    """The parts of a layer, and which rows own which of their neurons."""

    parts: tuple[Part, ...]
    """With experts: those that have rows, in the order of the rows."""
    masks: tuple[torch.Tensor | None, ...]
    """Per run, part after part: [rows of the part, n] bool; None where all rows own its neurons, or none does."""

    def each(self) -> Iterator[tuple[Part, Sequence[torch.Tensor | None]]]:
        """Every part with the masks of its runs."""
        begin = 0
        for part in self.parts:
            yield part, self.masks[begin : begin + len(part.runs)]
            begin += len(part.runs)


def owned_by(parts: Sequence[Part], pair_ids: torch.Tensor) -> Owned:
    """What rows own whose pairs are these: int64 [R], -1 for none."""
    masks = [
        None if run.owners is None else run.owners[part.of(pair_ids)] for part in parts for run in part.runs
    ]
    return Owned(tuple(parts), tuple(masks))


def _narrow(weight: torch.Tensor, dim: int, neurons: slice) -> torch.Tensor:
    return weight.narrow(dim, neurons.start, neurons.stop - neurons.start)


def _joined(weights: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """Bank after bank: what `join` has laid side by side as it lies there, else a copy for this pass alone, because
    training changes the banks, and ZeRO-3 takes them away."""
    first = weights[0]
    if len(weights) == 1:
        return first
    end = first.storage_offset()
    for weight in weights:
        here = (weight.untyped_storage()._cdata, weight.storage_offset(), weight.stride())
        if here != (first.untyped_storage()._cdata, end, first.stride()):
            return torch.cat(list(weights), dim)
        end += weight.shape[dim] * weight.stride(dim)
    shape = list(first.shape)
    shape[dim] = sum(weight.shape[dim] for weight in weights)
    return first.as_strided(shape, first.stride())


def join(weights: Sequence[torch.nn.Parameter], dim: int) -> None:
    """Lay weights side by side once, so that no pass copies them: the parameters become parts of the joined one."""
    joined = torch.cat([weight.data for weight in weights], dim)
    sizes = [weight.shape[dim] for weight in weights]
    for weight, part in zip(weights, torch.split(joined, sizes, dim), strict=True):
        weight.data = part


def _by_part(owned: Owned, product: Callable[[Part], torch.Tensor]) -> torch.Tensor:
    """The rows of all parts, one after the other."""
    results = [product(part) for part in owned.parts]
    return results[0] if len(results) == 1 else torch.cat(results)


def _by_bank(
    owned: Owned,
    neurons: torch.Tensor,
    product: Callable[[Part, torch.Tensor], torch.Tensor],
    shapes: Sequence[torch.Size],
    needed: Sequence[bool],
    dim: int,
) -> list[torch.Tensor | None]:
    """Gradients of the banks' weights; None where none is needed.

    Args:
        owned: parts and masks.
        neurons: [R, f], what the neurons contribute to the gradient.
        product: from a part, and those of one of its runs [rows, n], to the gradient of the run's joined weights.
        shapes: of the weights.
        needed: whether a bank's gradient is.
        dim: that of the neurons in the weights.
    """
    grads: list[torch.Tensor | None] = [None] * len(shapes)
    if owned.parts[0].neurons is not None:
        # Experts without rows leave their neurons as they are.
        grads = [
            neurons.new_zeros(shape) if want else None for shape, want in zip(shapes, needed, strict=True)
        ]
    for part, masks in owned.each():
        values, first = part.of(neurons), 0
        for run, mask in zip(part.runs, masks, strict=True):
            banks = range(first, first + run.banks)
            first += run.banks
            if not any(needed[bank] for bank in banks):
                continue
            own = run.of(values)
            if mask is not None:
                # Not times 0, which infinity would survive.
                own = own.masked_fill(~mask, 0.0)
            sizes = [part.size(bank, shapes[bank], dim) for bank in banks]
            for bank, piece in zip(banks, torch.split(product(part, own), sizes, dim), strict=True):
                grad = grads[bank]
                if grad is not None and part.neurons is not None:
                    _narrow(grad, dim, part.neurons[bank]).copy_(piece)
                elif needed[bank]:
                    grads[bank] = piece
    return grads


class _JoinedLinear(torch.autograd.Function):
    """x W^T for the joined W of all banks. The weight gradient of a neuron comes from the rows that own it alone, the
    gradient of x from all. `dim` is that of the neurons in W: 0 where they come out, 1 where they go in."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, owned: Owned, dim: int, *weights: torch.Tensor) -> torch.Tensor:
        trained = any(weight.requires_grad for weight in weights)
        ctx.parts, ctx.dim = owned.parts, dim
        # The banks themselves, not the joined copy: ZeRO-3 gathers them again for the backward pass.
        ctx.save_for_backward(x if trained else None, *(owned.masks if trained else ()), *weights)
        return _by_part(owned, lambda part: part.of(x) @ _joined(part.cut(weights, dim), dim).t())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,), dim, needed = grads, ctx.dim, ctx.needs_input_grad[3:]
        x, *saved = ctx.saved_tensors
        masks, weights = saved[: -len(needed)], saved[-len(needed) :]
        owned = Owned(ctx.parts, tuple(masks))
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _by_part(owned, lambda part: part.of(grad) @ _joined(part.cut(weights, dim), dim))
        if not any(needed):
            return grad_x, None, None, *([None] * len(needed))
        shapes = [weight.shape for weight in weights]
        if dim == 0:
            by_bank = _by_bank(owned, grad, lambda part, own: own.t() @ part.of(x), shapes, needed, dim)
        else:
            by_bank = _by_bank(owned, x, lambda part, own: part.of(grad).t() @ own, shapes, needed, dim)
        return grad_x, None, None, *by_bank


class _JoinedBias(torch.autograd.Function):
    """z + b for the joined b of all banks, whose gradient comes from the owning rows alone. Experts have none."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, owned: Owned, *biases: torch.Tensor) -> torch.Tensor:
        ctx.parts, ctx.shapes = owned.parts, [bias.shape for bias in biases]
        ctx.save_for_backward(*owned.masks)
        return z + _joined(biases, 0)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,), owned = grads, Owned(ctx.parts, ctx.saved_tensors)
        needed = ctx.needs_input_grad[2:]
        return grad, None, *_by_bank(owned, grad, lambda _, own: own.sum(0), ctx.shapes, needed, 0)


class _Scaled(torch.autograd.Function):
    """Values [R, f] times a factor per row and run: c_G, c_S ([R, 1], or None for 1) where the row owns the neurons,
    else 1; `mask` switches specific neurons off instead (0) where it does not."""

    @staticmethod
    def forward(
        ctx: Any,
        values: torch.Tensor,
        owned: Owned,
        mask: bool,
        general: torch.Tensor | None,
        specific: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.parts, ctx.mask = owned.parts, mask
        ctx.save_for_backward(None if general is None else values, general, specific, *owned.masks)
        return _Scaled._times(values, owned, mask, general, specific)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        values, general, specific, *masks = ctx.saved_tensors
        owned = Owned(ctx.parts, tuple(masks))
        grad_values = _Scaled._times(grads[0], owned, ctx.mask, general, specific)
        if values is None:
            return grad_values, None, None, None, None
        by_kind = {"general": torch.zeros_like(general), "specific": torch.zeros_like(specific)}
        for part, own in owned.each():
            grad, before = part.of(grads[0]), part.of(values)
            for run, mask in zip(part.runs, own, strict=True):
                if run.kind in by_kind:
                    products = run.of(grad) * run.of(before)
                    if mask is not None:
                        products.masked_fill_(~mask, 0.0)
                    part.of(by_kind[run.kind]).add_(products.sum(1, keepdim=True))
        return grad_values, None, None, by_kind["general"], by_kind["specific"]

    @staticmethod
    def _times(
        values: torch.Tensor,
        owned: Owned,
        mask: bool,
        general: torch.Tensor | None,
        specific: torch.Tensor | None,
    ) -> torch.Tensor:
        scaled, factors = torch.empty_like(values), {"general": general, "specific": specific}
        for part, masks in owned.each():
            before, after = part.of(values), part.of(scaled)
            for run, owning in zip(part.runs, masks, strict=True):
                factor = factors.get(run.kind)
                factor = None if factor is None else part.of(factor)
                if owning is not None:
                    other = 0.0 if mask and run.kind == "specific" else 1.0
                    factor = torch.where(owning, 1.0 if factor is None else factor, other).to(values.dtype)
                torch.mul(run.of(before), 1.0 if factor is None else factor, out=run.of(after))
        return scaled


def joined_linear(x: torch.Tensor, owned: Owned, dim: int, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """x W^T: [R, d] -> [R, f] for weights [n, d] (`dim` 0), [R, f] -> [R, d] for weights [d, n] (`dim` 1)."""
    return _JoinedLinear.apply(x, owned, dim, *weights)  # type: ignore[no-untyped-call, no-any-return]


def joined_bias(z: torch.Tensor, owned: Owned, biases: Sequence[torch.Tensor]) -> torch.Tensor:
    """z [R, f] + biases [n]."""
    return _JoinedBias.apply(z, owned, *biases)  # type: ignore[no-untyped-call, no-any-return]


def scaled(
    values: torch.Tensor,
    owned: Owned,
    mask: bool,
    general: torch.Tensor | None = None,
    specific: torch.Tensor | None = None,
) -> torch.Tensor:
    """Values [R, f] times their gates; see `_Scaled`."""
    return _Scaled.apply(values, owned, mask, general, specific)  # type: ignore[no-untyped-call, no-any-return]
