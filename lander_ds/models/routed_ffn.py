"""The routed FFN: banks of neurons, the gate that weighs them, gradients only for what a token's pair owns.

    out = FFN_G(c_G x) + FFN_S(m)(c_S x) + FFN_rest(x)          (P eq. 7 for G; partner and sum inferred)

This module needs torch alone: routed exports carry a copy of it, so that they compute what was trained.

Shapes: T tokens (leading dimensions flattened), d hidden width, n neurons of one bank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
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
    _owned: dict[tuple[Any, ...], torch.Tensor] = field(default_factory=dict, init=False, repr=False)
    """What `owned_tokens` has computed: the same for all layers."""

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

    def owned_tokens(self, pair_ids: torch.Tensor, owners: tuple[int, ...], pairs: int) -> torch.Tensor:
        """Indices (int64) of the tokens whose pair is among `owners`, of `pairs` pairs in all."""
        # The length belongs to the key, because one routing serves prefill and every step of a generation.
        key = (owners, len(pair_ids), pair_ids.device)
        if key not in self._owned:
            # One entry more than there are pairs: `NO_PAIR` finds it.
            table = torch.zeros(pairs + 1, dtype=torch.bool, device=pair_ids.device)
            table[list(owners)] = True
            self._owned[key] = table[pair_ids].nonzero().squeeze(-1)
        return self._owned[key]


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


class _OwnedLinear(torch.autograd.Function):
    """x W^T whose weight gradient comes from the owning tokens alone; the gradient of x from all."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, owned: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight, owned)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        x, weight, owned = ctx.saved_tensors
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = grad.t() @ x if owned is None else grad[owned].t() @ x[owned]
        return grad_x, grad_weight, None


class _OwnedBias(torch.autograd.Function):
    """z + b whose bias gradient comes from the owning tokens alone."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, bias: torch.Tensor, owned: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(owned)
        return z + bias

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        (owned,) = ctx.saved_tensors
        grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_bias = (grad if owned is None else grad[owned]).sum(0)
        return grad, grad_bias, None


def _owned_linear(x: torch.Tensor, weight: torch.Tensor, owned: torch.Tensor | None) -> torch.Tensor:
    return _OwnedLinear.apply(x, weight, owned)  # type: ignore[no-untyped-call, no-any-return]


def _owned_bias(z: torch.Tensor, bias: torch.Tensor, owned: torch.Tensor | None) -> torch.Tensor:
    return _OwnedBias.apply(z, bias, owned)  # type: ignore[no-untyped-call, no-any-return]


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
        self.up = nn.Parameter(up, requires_grad=False)
        self.down = nn.Parameter(down, requires_grad=False)
        self.register_parameter("gate", None if gate is None else nn.Parameter(gate, requires_grad=False))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def forward(
        self,
        x: torch.Tensor,
        activation: Callable[[torch.Tensor], torch.Tensor],
        owned: torch.Tensor | None,
        scale: torch.Tensor | None,
        keep: torch.Tensor | None,
    ) -> torch.Tensor:
        """Contribution of the bank to the FFN output.

        Args:
            x: [T, d].
            activation: the family's non-linearity.
            owned: indices of the tokens that send weight gradients; None: all.
            scale: [T, 1] factor of the FFN input. It multiplies the pre-activations, which for the bias-free
                part is the same; a bias is added after it.
            keep: [T, 1] factor of the neurons' activations (0 masks a token's neurons), or None.

        Returns: [T, d].
        """
        z = _owned_linear(x, self.up, owned)
        if scale is not None:
            z = z * scale
        if self.bias is not None:
            z = _owned_bias(z, self.bias, owned)
        if self.gate is None:
            h = activation(z)
        else:
            g = _owned_linear(x, self.gate, owned)
            h = activation(g if scale is None else g * scale) * z
        if keep is not None:
            h = h * keep
        return _owned_linear(h, self.down, owned)


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
        self.router = gate
        self.options = dict(options)
        self.pairs = tuple(pairs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """FFN output, same shape as `x` [..., d], inside `routed`."""
        current = _CURRENT.get()
        if current is None:
            raise RuntimeError(
                f"the language pair is not set: pass pair=... (one of {', '.join(self.pairs)}, or {NONE})"
            )
        routing, gates = current
        shape = x.shape
        pair_ids = routing.tokens(shape[:-1], x.device)
        flat = x.reshape(-1, shape[-1])
        general, specific = self._scales(flat, routing, gates)
        output: torch.Tensor | None = None
        for bank in self.banks:
            assert isinstance(bank, BankFFN)
            # A single pair owns specific banks, which tokens of no pair do not.
            everyone = bank.kind == "general" and len(bank.owners) == len(self.pairs)
            owned = None
            if bank.kind != "frozen" and not everyone:
                owned = routing.owned_tokens(pair_ids, bank.owners, len(self.pairs))
            part = self._bank_output(bank, flat, owned, general, specific)
            output = part if output is None else output + part
        assert output is not None
        if self.output_bias is not None:
            output = output + self.output_bias
        return output.reshape(shape)

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

    def _bank_output(
        self,
        bank: BankFFN,
        x: torch.Tensor,
        owned: torch.Tensor | None,
        general: torch.Tensor | None,
        specific: torch.Tensor | None,
    ) -> torch.Tensor:
        """One bank's contribution [T, d]; `owned`: indices of the tokens that own it, None: all."""
        if bank.kind == "frozen":
            return bank(x, self.activation, None, None, None)  # type: ignore[no-any-return]
        scale = general if bank.kind == "general" else specific
        keep = None
        if owned is not None:
            if scale is not None:
                scale = torch.ones_like(scale).index_copy(0, owned, scale.index_select(0, owned))
            if self.options["other_pairs"] == "mask" and bank.kind == "specific":
                keep = x.new_zeros(len(x), 1).index_fill(0, owned, 1.0)
        if self.options["gate"] == "output":
            part: torch.Tensor = bank(x, self.activation, owned, None, keep)
            return part if scale is None else part * scale
        return bank(x, self.activation, owned, scale, keep)  # type: ignore[no-any-return]


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
