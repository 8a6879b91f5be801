"""The routed FFN: banks of neurons, the gate that weighs them, gradients only for what a token's pair owns.

    out = FFN_G(c_G x) + FFN_S(m)(c_S x) + FFN_rest(x)          (P eq. 7 for G; partner and sum inferred)

The weights of all banks are joined for one product per projection: the sum over banks is then the sum over neurons, and
neither the number of products nor their alignment depends on the number of pairs. Gates and ownership are factors and
masks per token and neuron, looked up by pair id, so that the host never waits for a device.

This module needs torch alone: routed exports carry a copy of it, so that they compute what was trained.

Shapes: T tokens (leading dimensions flattened), d hidden width, n neurons of one bank, f neurons of all, M pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.nn import functional

UNIFORM_BITS = 24

NO_PAIR = -1
"""Pair id of a token that belongs to no pair: padding, or text in a direction that owns no bank. It owns what all pairs
own, the general banks with their gate, and is to specific banks what the tokens of other pairs are."""
NONE = "none"
"""Its name where pairs have names."""


def pair_id(pair: str, pairs: Sequence[str]) -> int:
    """The id of a pair, or `NO_PAIR` for `NONE`. Nothing else stands for no pair, so that a mistyped one is noticed.

    Raises:
        ValueError: the pair is not among `pairs`.
    """
    if pair == NONE:
        return NO_PAIR
    if pair not in pairs:
        raise ValueError(
            f"unknown pair {pair!r}: this model knows {', '.join(pairs)}, and {NONE!r} for every other direction"
        )
    return list(pairs).index(pair)


@dataclass(frozen=True, eq=False)
class Routing:
    """What the routed FFNs need to know of one batch besides its hidden states.

    `pair_ids` are int64: 0-dimensional for a batch of one pair, [B] or [B, 1] per row, or one per token ([T], [B, T]).
    `NO_PAIR` is among them. The rest is for training.
    """

    pair_ids: torch.Tensor
    noise_keys: torch.Tensor | None = None
    """[T] int64, unique per (step, sample, position); the layer is added by the FFN."""
    alpha: float = 0.0
    """Weight of the gate noise."""

    def tokens(self, shape: torch.Size, device: torch.device) -> torch.Tensor:
        """Pair ids [T] on a device, for an input there of leading dimensions `shape` (T = their product).

        Only the product counts, because some families (OPT) flatten [B, T] before the FFN; beam search, which
        repeats every row, fits too.
        """
        tokens = math.prod(shape)
        rows = self.pair_ids.to(device).reshape(-1, 1)
        if tokens % len(rows):
            raise RuntimeError(
                f"{len(rows)} pair ids do not fit {tokens} tokens: set one for all, one per row, or one per "
                "token of this very forward pass"
            )
        return rows.expand(-1, tokens // len(rows)).reshape(-1)


GateSink = Callable[[torch.Tensor], None]
"""Gets the values c [T, 1] of a gate, which carry gradients."""

_CURRENT: ContextVar[tuple[Routing, GateSink | None] | None] = ContextVar("routing", default=None)
"""Decoder layers hand their FFN nothing but x, so the last step to it is made here: per thread, and per call."""


@contextmanager
def routed(routing: Routing, gates: GateSink | None = None) -> Iterator[None]:
    """Within this context, in this thread, routed FFNs follow `routing`.

    Args:
        routing: of the batch.
        gates: called by every gate with its values.
    """
    token = _CURRENT.set((routing, gates))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def carrying(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with the routing of this very moment, whenever and in whatever thread it is called."""
    current = _CURRENT.get()

    def call(*args: Any, **kwargs: Any) -> Any:
        token = _CURRENT.set(current)
        try:
            return function(*args, **kwargs)
        finally:
            _CURRENT.reset(token)

    return call


@dataclass(frozen=True, eq=False)
class _Run:
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
        """The run's columns of values [T, f]."""
        return values[:, self.begin : self.end]


def _is_partly_owned(bank: BankFFN, pairs: int) -> bool:
    """Whether tokens differ in owning a bank. Those of no pair own general banks, but not a single pair's specific ones."""
    return bank.kind == "specific" or 0 < len(bank.owners) < pairs


def _runs(banks: Sequence[BankFFN], pairs: int, device: torch.device) -> tuple[_Run, ...]:
    """The runs of banks for M = `pairs` pairs."""
    runs, begin = [], 0
    for (kind, partly), members in groupby(banks, lambda bank: (bank.kind, _is_partly_owned(bank, pairs))):
        group = list(members)
        sizes = [bank.size for bank in group]
        owners = None
        if partly:
            rows = [[pair in bank.owners for bank in group] for pair in range(pairs)]
            table = torch.tensor([*rows, [False] * len(group)])
            spread = table.repeat_interleave(torch.tensor(sizes), dim=1, output_size=sum(sizes))
            owners = spread.to(device)
        runs.append(_Run(kind, len(group), begin, begin + sum(sizes), owners))
        begin += sum(sizes)
    return tuple(runs)


@dataclass(frozen=True, eq=False)
class _Owned:
    """The runs of a layer, and which tokens own which of their neurons."""

    runs: tuple[_Run, ...]
    masks: tuple[torch.Tensor | None, ...]
    """Per run: [T, n] bool; None where all tokens own its neurons, or none does."""


def _joined(weights: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """Bank after bank: what `RoutedFFN.join` has laid side by side as it lies there, else a copy for this pass alone,
    because training changes the banks, and ZeRO-3 takes them away."""
    first = weights[0]
    end = first.storage_offset()
    for weight in weights:
        here = (weight.untyped_storage()._cdata, weight.storage_offset(), weight.stride())
        if here != (first.untyped_storage()._cdata, end, first.stride()):
            return torch.cat(list(weights), dim)
        end += weight.shape[dim] * weight.stride(dim)
    shape = list(first.shape)
    shape[dim] = sum(weight.shape[dim] for weight in weights)
    return first.as_strided(shape, first.stride())


def _by_bank(
    owned: _Owned,
    neurons: torch.Tensor,
    product: Callable[[torch.Tensor], torch.Tensor],
    sizes: Sequence[int],
    needed: Sequence[bool],
    dim: int,
) -> list[torch.Tensor | None]:
    """Gradients of the banks' weights; None where none is needed.

    Args:
        owned: runs and masks.
        neurons: [T, f], what the neurons contribute to the gradient.
        product: from those of a run [T, n] to the gradient of its joined weights.
        sizes: n of every bank.
        needed: whether a bank's gradient is.
        dim: that of the neurons in the weights.
    """
    grads: list[torch.Tensor | None] = []
    for run, mask in zip(owned.runs, owned.masks, strict=True):
        banks = slice(len(grads), len(grads) + run.banks)
        if not any(needed[banks]):
            grads += [None] * run.banks
            continue
        own = run.of(neurons)
        if mask is not None:
            # Not times 0, which infinity would survive.
            own = own.masked_fill(~mask, 0.0)
        parts = torch.split(product(own), list(sizes[banks]), dim)
        grads += [part if want else None for part, want in zip(parts, needed[banks], strict=True)]
    return grads


class _JoinedLinear(torch.autograd.Function):
    """x W^T for the joined W of all banks. The weight gradient of a neuron comes from the tokens that own it alone, the
    gradient of x from all. `dim` is that of the neurons in W: 0 where they come out, 1 where they go in."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, owned: _Owned, dim: int, *weights: torch.Tensor) -> torch.Tensor:
        trained = any(weight.requires_grad for weight in weights)
        ctx.runs, ctx.dim = owned.runs, dim
        # The banks themselves, not the joined copy: ZeRO-3 gathers them again for the backward pass.
        ctx.save_for_backward(x if trained else None, *(owned.masks if trained else ()), *weights)
        return x @ _joined(weights, dim).t()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,), dim, needed = grads, ctx.dim, ctx.needs_input_grad[3:]
        x, *saved = ctx.saved_tensors
        masks, weights = saved[: -len(needed)], saved[-len(needed) :]
        grad_x = grad @ _joined(weights, dim) if ctx.needs_input_grad[0] else None
        if not any(needed):
            return grad_x, None, None, *([None] * len(needed))
        sizes = [weight.shape[dim] for weight in weights]
        owned = _Owned(ctx.runs, tuple(masks))
        if dim == 0:
            by_bank = _by_bank(owned, grad, lambda own: own.t() @ x, sizes, needed, dim)
        else:
            by_bank = _by_bank(owned, x, lambda own: grad.t() @ own, sizes, needed, dim)
        return grad_x, None, None, *by_bank


class _JoinedBias(torch.autograd.Function):
    """z + b for the joined b of all banks, whose gradient comes from the owning tokens alone."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, owned: _Owned, *biases: torch.Tensor) -> torch.Tensor:
        ctx.runs, ctx.sizes = owned.runs, [len(bias) for bias in biases]
        ctx.save_for_backward(*owned.masks)
        return z + _joined(biases, 0)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,), owned = grads, _Owned(ctx.runs, ctx.saved_tensors)
        needed = ctx.needs_input_grad[2:]
        return grad, None, *_by_bank(owned, grad, lambda own: own.sum(0), ctx.sizes, needed, 0)


class _Scaled(torch.autograd.Function):
    """Values [T, f] times a factor per token and run: c_G, c_S ([T, 1], or None for 1) where the token owns the neurons,
    else 1; `mask` switches specific neurons off instead (0) where it does not."""

    @staticmethod
    def forward(
        ctx: Any,
        values: torch.Tensor,
        owned: _Owned,
        mask: bool,
        general: torch.Tensor | None,
        specific: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.runs, ctx.mask = owned.runs, mask
        ctx.save_for_backward(None if general is None else values, general, specific, *owned.masks)
        return _Scaled._times(values, owned, mask, general, specific)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        values, general, specific, *masks = ctx.saved_tensors
        owned = _Owned(ctx.runs, tuple(masks))
        grad_values = _Scaled._times(grads[0], owned, ctx.mask, general, specific)
        if values is None:
            return grad_values, None, None, None, None
        by_kind = {"general": torch.zeros_like(general), "specific": torch.zeros_like(specific)}
        for run, mask in zip(owned.runs, owned.masks, strict=True):
            if run.kind in by_kind:
                products = run.of(grads[0]) * run.of(values)
                if mask is not None:
                    products.masked_fill_(~mask, 0.0)
                by_kind[run.kind] += products.sum(1, keepdim=True)
        return grad_values, None, None, by_kind["general"], by_kind["specific"]

    @staticmethod
    def _times(
        values: torch.Tensor,
        owned: _Owned,
        mask: bool,
        general: torch.Tensor | None,
        specific: torch.Tensor | None,
    ) -> torch.Tensor:
        scaled = torch.empty_like(values)
        for run, owning in zip(owned.runs, owned.masks, strict=True):
            factor = {"general": general, "specific": specific}.get(run.kind)
            if owning is not None:
                other = 0.0 if mask and run.kind == "specific" else 1.0
                factor = torch.where(owning, 1.0 if factor is None else factor, other).to(values.dtype)
            torch.mul(run.of(values), 1.0 if factor is None else factor, out=run.of(scaled))
        return scaled


def _joined_linear(x: torch.Tensor, owned: _Owned, dim: int, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    return _JoinedLinear.apply(x, owned, dim, *weights)  # type: ignore[no-untyped-call, no-any-return]


def _joined_bias(z: torch.Tensor, owned: _Owned, biases: Sequence[torch.Tensor]) -> torch.Tensor:
    return _JoinedBias.apply(z, owned, *biases)  # type: ignore[no-untyped-call, no-any-return]


def _scaled(
    values: torch.Tensor,
    owned: _Owned,
    mask: bool,
    general: torch.Tensor | None = None,
    specific: torch.Tensor | None = None,
) -> torch.Tensor:
    return _Scaled.apply(values, owned, mask, general, specific)  # type: ignore[no-untyped-call, no-any-return]


class BankFFN(nn.Module):
    """The neurons of one bank: rows of the in-projections, columns of the out-projection."""

    group = ""
    """Name of the bank's parameter group, set by surgery."""
    gate: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        kind: str,
        owners: Sequence[int],
        up: torch.Tensor,
        down: torch.Tensor,
        gate: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> None:
        """Make a bank.

        Args:
            kind: general, specific or frozen.
            owners: ids of the pairs that own it.
            up: [n, d].
            down: [d, n].
            gate: [n, d] of a gated FFN, or None.
            bias: [n] of the in-projection, or None.
        """
        super().__init__()
        self.kind = kind
        self.owners = tuple(owners)
        self.size = len(up)
        self.up = nn.Parameter(up, requires_grad=False)
        self.down = nn.Parameter(down, requires_grad=False)
        self.register_parameter("gate", None if gate is None else nn.Parameter(gate, requires_grad=False))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @property
    def present(self) -> bool:
        """Whether the weights are here; not where they are offloaded (on meta) or sharded (no matrices)."""
        return self.up.dim() == 2 and not self.up.is_meta

    def forward(self, run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """`run(x)`, during which the weights are here: who offloads or shards weights brings them for this call."""
        return run(x)


class Gate(nn.Module):
    """CAR: a = relu(x W1 + b1) w2 + b2, one logit per token (R, Zhang et al. 2021)."""

    def __init__(self, w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor) -> None:
        """Take the parameters: w1 [hidden, d], b1 [hidden], w2 [1, hidden], b2 [1]."""
        super().__init__()
        self.w1, self.b1 = nn.Parameter(w1), nn.Parameter(b1)
        self.w2, self.b2 = nn.Parameter(w2), nn.Parameter(b2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [T, 1] in float32 of x [T, d]."""
        inner = torch.relu(functional.linear(x, self.w1, self.b1))
        return functional.linear(inner, self.w2, self.b2).float()


def gate_noise(keys: torch.Tensor, layer: int) -> torch.Tensor:
    """Standard normal noise that depends on nothing but the keys and the layer: the same on every rank.

    SplitMix64 (R, Steele et al. 2014) makes two 24-bit uniforms of each key, Box-Muller a normal of those.

    Args:
        keys: [T] int64. layer: decoder layer index.

    Returns: [T] float32.
    """
    # The constants of SplitMix64; int64 arithmetic wraps like the unsigned original.
    mixed = keys + _int64((layer + 1) * 0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ _shift_right(mixed, shift)) * _int64(factor)
    mixed = mixed ^ _shift_right(mixed, 31)
    mask = (1 << UNIFORM_BITS) - 1
    first = ((mixed & mask) + 1).double() / (mask + 1)
    second = (_shift_right(mixed, 64 - UNIFORM_BITS) & mask).double() / (mask + 1)
    return (torch.sqrt(-2.0 * torch.log(first)) * torch.cos(2.0 * math.pi * second)).float()


def _int64(value: int) -> int:
    """The signed integer with the same lowest 64 bits."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def _shift_right(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical (zero-filling) right shift of int64."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


class RoutedFFN(nn.Module):
    """An FFN split into banks. Stands where the HF module was, or its in-projection where there is none."""

    replaced: tuple[nn.Module, ...] = ()
    """The HF module whose place it took, set by surgery; in a tuple, so that it is no submodule."""
    output_bias: nn.Parameter | None
    rest: nn.Module | None
    """What computes the frozen neurons, [T, d] -> [T, d], where they are in no bank (quantised ones)."""

    def __init__(
        self,
        layer: int,
        banks: Sequence[BankFFN],
        activation: nn.Module,
        output_bias: torch.Tensor | None,
        gate: Gate | None,
        options: dict[str, Any],
        pairs: Sequence[str],
    ) -> None:
        """Assemble.

        Args:
            layer: decoder layer index.
            banks: in the order of the selection.
            activation: the family's non-linearity.
            output_bias: [d] of the out-projection, counted once, or None.
            gate: the gate, or None for no routing.
            options: `gate` input|output|none, `gate_init` preserve|paper, `gate_eval` soft|hard,
                `other_pairs` keep|mask.
            pairs: names, in the order of the pair ids.
        """
        super().__init__()
        self.layer = layer
        self.banks = nn.ModuleList(banks)
        self.activation = activation
        bias = None if output_bias is None else nn.Parameter(output_bias, requires_grad=False)
        self.register_parameter("output_bias", bias)
        self.register_module("rest", None)
        self.router = gate
        self.options = dict(options)
        self.pairs = tuple(pairs)
        self._runs_by_device: dict[torch.device, tuple[_Run, ...]] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """FFN output, same shape as `x` [..., d], inside `routed`."""
        current = _CURRENT.get()
        if current is None:
            raise RuntimeError(
                f"the language pair is not set: pass pair=... (one of {', '.join(self.pairs)}, or {NONE})"
            )
        routing, gates = current
        shape = x.shape
        flat = x.reshape(-1, shape[-1])
        pair_ids = routing.tokens(shape[:-1], x.device)
        runs = self._runs_on(x.device)
        masks = (None if run.owners is None else run.owners[pair_ids] for run in runs)
        scales = self._scales(flat, routing, gates)
        run = partial(self._output, _Owned(runs, tuple(masks)), scales)
        for bank in self._banks:
            if not bank.present:
                run = partial(bank, run)
        output = run(flat)
        if self.rest is not None:
            output = output + self.rest(flat)
        if self.output_bias is not None:
            output = output + self.output_bias
        return output.reshape(shape)

    def join(self) -> None:
        """Lay the weights of the banks side by side once, so that no pass copies them: for inference, where they stay as
        and where they are. The banks' parameters become parts of the joined ones."""
        for role, dim in (("up", 0), ("gate", 0), ("bias", 0), ("down", 1)):
            weights = [weight for bank in self._banks if (weight := getattr(bank, role)) is not None]
            if weights:
                joined = torch.cat([weight.data for weight in weights], dim)
                sizes = [weight.shape[dim] for weight in weights]
                for weight, part in zip(weights, torch.split(joined, sizes, dim), strict=True):
                    weight.data = part

    @property
    def _banks(self) -> list[BankFFN]:
        return [bank for bank in self.banks if isinstance(bank, BankFFN)]

    def _runs_on(self, device: torch.device) -> tuple[_Run, ...]:
        """The runs, with tables on a device; made once."""
        if device not in self._runs_by_device:
            self._runs_by_device[device] = _runs(self._banks, len(self.pairs), device)
        return self._runs_by_device[device]

    def _output(
        self, owned: _Owned, scales: tuple[torch.Tensor | None, torch.Tensor | None], x: torch.Tensor
    ) -> torch.Tensor:
        """The banks' outputs, added up: [T, d] of x [T, d].

        Args:
            owned: which tokens own which neurons.
            scales: c_G and c_S. Of the input: they multiply the pre-activations, which for the bias-free part is the
                same; a bias is added after it. Of the output: they multiply the activations.
            x: [T, d].
        """
        banks, mask = self._banks, self.options["other_pairs"] == "mask"
        scaled = scales[0] is not None
        before = scaled and self.options["gate"] == "input"
        z = _joined_linear(x, owned, 0, [bank.up for bank in banks])
        if before:
            z = _scaled(z, owned, False, *scales)
        biases = [bank.bias for bank in banks if bank.bias is not None]
        if biases:
            z = _joined_bias(z, owned, biases)
        gates = [bank.gate for bank in banks if bank.gate is not None]
        if gates:
            g = _joined_linear(x, owned, 0, gates)
            z = self.activation(_scaled(g, owned, False, *scales) if before else g) * z
        else:
            z = self.activation(z)
        if scaled and not before:
            z = _scaled(z, owned, mask, *scales)
        elif mask:
            z = _scaled(z, owned, mask)
        return _joined_linear(z, owned, 1, [bank.down for bank in banks])

    def _scales(
        self, x: torch.Tensor, routing: Routing, gates: GateSink | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """c_G and c_S, each [T, 1] in the type of x; (None, None) without a gate."""
        if self.router is None:
            return None, None
        logits = self.router(x)
        if self.training and routing.alpha > 0.0 and routing.noise_keys is not None:
            logits = logits + routing.alpha * gate_noise(routing.noise_keys, self.layer).unsqueeze(-1)
        c = torch.sigmoid(logits)
        if not self.training and self.options["gate_eval"] == "hard":
            c = (c >= 0.5).float()
        if gates is not None:
            gates(c)
        factor = 2.0 if self.options["gate_init"] == "preserve" else 1.0
        return (factor * c).to(x.dtype), (factor * (1.0 - c)).to(x.dtype)


def substitute(layer: nn.Module, paths: Mapping[str, str | None], routed: RoutedFFN) -> None:
    """Put a routed FFN where a decoder layer's FFN is.

    Args:
        layer: the HF decoder layer.
        paths: where its FFN lies: `block` (replaced as a whole) or None, and `up`, `activation`, `down`
            (without a block the routed FFN takes the place of `up`, the others become identities).
        routed: the routed FFN.
    """
    if paths["block"] is not None:
        replace(layer, paths["block"], routed)
        return
    replace(layer, str(paths["up"]), routed)
    replace(layer, str(paths["activation"]), nn.Identity())
    replace(layer, str(paths["down"]), nn.Identity())


def replace(root: nn.Module, path: str, module: nn.Module) -> None:
    """Set the submodule of `root` at a dotted path."""
    parent, _, child = path.rpartition(".")
    setattr(root.get_submodule(parent) if parent else root, child, module)
