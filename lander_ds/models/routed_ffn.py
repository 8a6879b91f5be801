"""The routed FFN: banks of neurons, the gate that weighs them, gradients only for what a token's pair owns.

    out = FFN_G(c_G x) + FFN_S(m)(c_S x) + FFN_rest(x)          (P eq. 7 for G; partner and sum inferred)

This module needs torch alone: routed exports carry a copy of it, so that they compute what was trained.

Shapes: T tokens (leading dimensions flattened), d hidden width, n neurons of one bank, M pairs, E examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

UNIFORM_BITS = 24


class RoutingState:
    """What the routed FFNs of one model share during a forward pass. Plain data, no parameters.

    `pair_ids` must be set before every forward: int64 pair ids, 0-dimensional for a batch of one pair, [B] or
    [B, 1] per row, or one per token ([T], [B, T]). -1 is padding, which owns no specific bank and must carry
    no loss. The rest is for training.
    """

    def __init__(self, pairs: Sequence[str]) -> None:
        self.pairs = tuple(pairs)
        self.pair_ids: torch.Tensor | None = None
        self.segment_ids: torch.Tensor | None = None
        """[T] number of the example each token belongs to; set when budget or noise need it."""
        self.examples = 0
        """E, examples in this micro-batch."""
        self.noise_keys: torch.Tensor | None = None
        """[T] int64, unique per (step, sample, position); the layer is added by the FFN."""
        self.alpha = 0.0
        """Weight of the gate noise; 0 in evaluation."""
        self.statistics: dict[int, torch.Tensor] | None = None
        """When a dict: per layer [2, M] float64 sums of c and token counts per pair, over all forwards."""
        self.specific_share: list[torch.Tensor] | None = None
        """When a list: every gate appends [E], the sum of 1 - c over an example's tokens (for the budget)."""
        self._owned: dict[tuple[tuple[int, ...], int], torch.Tensor] = {}

    def begin(self, pair_ids: torch.Tensor) -> None:
        """Set the pair ids of the forward passes that follow."""
        self.pair_ids = pair_ids
        self._owned = {}

    def tokens(self, shape: torch.Size) -> torch.Tensor:
        """Pair ids [T] for an input of leading dimensions `shape` (T = their product).

        Only the product counts, because some families (OPT) flatten [B, T] before the FFN; beam search, which
        repeats every row, fits too.
        """
        if self.pair_ids is None:
            raise RuntimeError(
                f"the language pair is not set: pass pair=... (one of {', '.join(self.pairs)})"
            )
        tokens = math.prod(shape)
        rows = self.pair_ids.reshape(-1, 1)
        if tokens % len(rows):
            raise RuntimeError(
                f"{len(rows)} pair ids do not fit {tokens} tokens: set one for all, one per row, or one per "
                "token of this very forward pass"
            )
        return rows.expand(-1, tokens // len(rows)).reshape(-1)

    def owned_tokens(self, pair_ids: torch.Tensor, owners: tuple[int, ...]) -> torch.Tensor:
        """Indices (int64) of the tokens whose pair is among `owners`; computed once for all layers."""
        # The length belongs to the key, because one `begin` serves prefill and every step of a generation.
        key = (owners, len(pair_ids))
        if key not in self._owned:
            # One entry more than there are pairs: id -1 (padding) finds it.
            table = torch.zeros(len(self.pairs) + 1, dtype=torch.bool, device=pair_ids.device)
            table[list(owners)] = True
            self._owned[key] = table[pair_ids].nonzero().squeeze(-1)
        return self._owned[key]


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
        state: RoutingState,
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
            state: shared by all routed FFNs of the model.
        """
        super().__init__()
        self.layer = layer
        self.banks = nn.ModuleList(banks)
        self.activation = activation
        bias = None if output_bias is None else nn.Parameter(output_bias, requires_grad=False)
        self.register_parameter("output_bias", bias)
        self.router = gate
        self.options = dict(options)
        self.state = state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """FFN output, same shape as `x` [..., d]."""
        shape = x.shape
        pair_ids = self.state.tokens(shape[:-1])
        flat = x.reshape(-1, shape[-1])
        general, specific = self._scales(flat, pair_ids)
        output: torch.Tensor | None = None
        for bank in self.banks:
            assert isinstance(bank, BankFFN)
            part = self._bank_output(bank, flat, pair_ids, general, specific)
            output = part if output is None else output + part
        assert output is not None
        if self.output_bias is not None:
            output = output + self.output_bias
        return output.reshape(shape)

    def _scales(
        self, x: torch.Tensor, pair_ids: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """c_G and c_S, each [T, 1] in the type of x; (None, None) without a gate."""
        if self.router is None:
            return None, None
        logits = self.router(x)
        state = self.state
        if self.training and state.alpha > 0.0 and state.noise_keys is not None:
            logits = logits + state.alpha * gate_noise(state.noise_keys, self.layer).unsqueeze(-1)
        c = torch.sigmoid(logits)
        if not self.training and self.options["gate_eval"] == "hard":
            c = (c >= 0.5).float()
        self._record(c, pair_ids)
        factor = 2.0 if self.options["gate_init"] == "preserve" else 1.0
        return (factor * c).to(x.dtype), (factor * (1.0 - c)).to(x.dtype)

    def _record(self, c: torch.Tensor, pair_ids: torch.Tensor) -> None:
        """Add c [T, 1] to the statistics and the budget that the trainer asked for."""
        state = self.state
        if state.statistics is not None:
            values = c.detach().squeeze(-1).double()
            known = pair_ids >= 0
            sums = torch.zeros(2, len(state.pairs), dtype=torch.float64, device=c.device)
            sums[0].index_add_(0, pair_ids[known], values[known])
            sums[1].index_add_(0, pair_ids[known], torch.ones_like(values[known]))
            state.statistics[self.layer] = state.statistics.get(self.layer, 0.0) + sums
        if state.specific_share is not None and state.segment_ids is not None:
            share = torch.zeros(state.examples, dtype=c.dtype, device=c.device)
            state.specific_share.append(share.index_add(0, state.segment_ids, 1.0 - c.squeeze(-1)))

    def _bank_output(
        self,
        bank: BankFFN,
        x: torch.Tensor,
        pair_ids: torch.Tensor,
        general: torch.Tensor | None,
        specific: torch.Tensor | None,
    ) -> torch.Tensor:
        """One bank's contribution [T, d]."""
        if bank.kind == "frozen":
            return bank(x, self.activation, None, None, None)  # type: ignore[no-any-return]
        everyone = len(bank.owners) == len(self.state.pairs)
        owned = None if everyone else self.state.owned_tokens(pair_ids, bank.owners)
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


def take_place(layer: nn.Module, paths: Mapping[str, str | None], routed: RoutedFFN) -> None:
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
