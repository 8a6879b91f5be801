"""The routed FFN: banks of neurons, the gate that weighs them, gradients only for what a token's pair owns.

    out = FFN_G(c_G x) + FFN_S(m)(c_S x) + FFN_rest(x)          (P eq. 7 for G; partner and sum inferred)

The weights of all banks are joined for one product per projection (`joined.py`), so that neither the number of products
nor their alignment depends on the number of pairs. Gates and ownership are factors and masks per token and neuron, looked
up by pair id, so that the host never waits for a device.

Of a mixture of experts, a bank has neurons of many experts: each token's gate and ownership follow it to its experts.

Routed exports carry copies of this module, `joined.py` and `experts.py`, so that they compute what was trained.

Shapes: T tokens (leading dimensions flattened), d hidden width, n neurons of one bank, f neurons of all, M pairs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .experts import Dispatch
from .joined import Owned, Part, join, joined_bias, joined_linear, owned_by, runs_of, scaled

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
        experts: Sequence[int] = (),
    ) -> None:
        """Make a bank.

        Args:
            kind: general, specific or frozen.
            owners: ids of the pairs that own it.
            up: [n, d].
            down: [d, n].
            gate: [n, d] of a gated FFN, or None.
            bias: [n] of the in-projection, or None.
            experts: of a mixture, how many of the neurons each expert has, in the order of the neurons.
        """
        super().__init__()
        self.kind = kind
        self.owners = tuple(owners)
        self.experts = tuple(experts)
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
        """`run(x)`, during which the weights are here: whatever offloads or shards weights brings them for this call."""
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
        self._parts_by_device: dict[torch.device, tuple[Part, ...]] = {}

    def forward(
        self, x: torch.Tensor, chosen: torch.Tensor | None = None, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """FFN output, same shape as `x` [..., d], inside `routed`.

        Args:
            x: the FFN's input.
            chosen, weights: in place of experts, which of them each token was sent to, [T, k] int64, and with what weight.
        """
        current = _CURRENT.get()
        if current is None:
            raise RuntimeError(
                f"the language pair is not set: pass pair=... (one of {', '.join(self.pairs)}, or {NONE})"
            )
        routing, gates = current
        shape = x.shape
        flat = x.reshape(-1, shape[-1])
        pair_ids = routing.tokens(shape[:-1], x.device)
        scales, parts, dispatch = self._scales(flat, routing, gates), self._parts_on(x.device), None
        rows = flat
        if chosen is not None:
            dispatch = Dispatch.of(chosen, len(parts))
            parts = tuple(dataclasses.replace(parts[expert], rows=own) for expert, own in dispatch.rows())
            rows, pair_ids = flat[dispatch.tokens], pair_ids[dispatch.tokens]
            scales = tuple(None if scale is None else scale[dispatch.tokens] for scale in scales)
        run = partial(self._output, owned_by(parts, pair_ids), scales)
        for bank in self._banks:
            if not bank.present:
                run = partial(bank, run)
        output = run(rows)
        if dispatch is not None and weights is not None:
            output = dispatch.combined(output, weights, flat)
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
                join(weights, dim)

    @property
    def _banks(self) -> list[BankFFN]:
        return [bank for bank in self.banks if isinstance(bank, BankFFN)]

    def _parts_on(self, device: torch.device) -> tuple[Part, ...]:
        """The parts, with tables on a device; made once. Of a mixture, one per expert, still without rows."""
        if device not in self._parts_by_device:
            banks, pairs = [(bank.kind, bank.owners) for bank in self._banks], len(self.pairs)
            sizes = [bank.experts or (bank.size,) for bank in self._banks]
            borders = [[slice(*ends) for ends in pairwise(accumulate(own, initial=0))] for own in sizes]
            mixture = any(bank.experts for bank in self._banks)
            self._parts_by_device[device] = tuple(
                Part(runs_of(banks, own, pairs, device), neurons=neurons if mixture else None)
                for own, neurons in zip(zip(*sizes, strict=True), zip(*borders, strict=True), strict=True)
            )
        return self._parts_by_device[device]

    def _output(self, owned: Owned, scales: tuple[torch.Tensor | None, ...], x: torch.Tensor) -> torch.Tensor:
        """The banks' outputs, added up: [R, d] of x [R, d], where R is T or, with experts, T k.

        Args:
            owned: which rows own which neurons.
            scales: c_G and c_S. Of the input: they multiply the pre-activations, which for the bias-free part is the
                same; a bias is added after it. Of the output: they multiply the activations.
            x: [R, d].
        """
        banks, mask = self._banks, self.options["other_pairs"] == "mask"
        gated = scales[0] is not None
        before = gated and self.options["gate"] == "input"
        z = joined_linear(x, owned, 0, [bank.up for bank in banks])
        if before:
            z = scaled(z, owned, False, *scales)
        biases = [bank.bias for bank in banks if bank.bias is not None]
        if biases:
            z = joined_bias(z, owned, biases)
        gates = [bank.gate for bank in banks if bank.gate is not None]
        if gates:
            g = joined_linear(x, owned, 0, gates)
            z = self.activation(scaled(g, owned, False, *scales) if before else g) * z
        else:
            z = self.activation(z)
        if gated and not before:
            z = scaled(z, owned, mask, *scales)
        elif mask:
            z = scaled(z, owned, mask)
        return joined_linear(z, owned, 1, [bank.down for bank in banks])

    def _scales(
        self, x: torch.Tensor, routing: Routing, gates: GateSink | None
    ) -> tuple[torch.Tensor | None, ...]:
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
