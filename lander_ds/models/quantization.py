"""The frozen base in 8 or 4 bits (`model.quantize`), by bitsandbytes: what is trained keeps the exact weights of the base.

In every decoder layer the frozen projections, and the frozen banks of routed FFNs, hold codes and scales in place of
weights. For a product the weights are put together anew in the type of the input, forward and backward, and let go of:
the gradient of x needs them, and a weight gradient nobody wants.

This holds for one device: a weight is quantised after it was placed and is never cut, so ZeRO-3 cannot shard it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import nn

from lander_ds.config.schema.types import Quantization
from lander_ds.models.loading import Placement
from lander_ds.models.routed_ffn import BankFFN, RoutedFFN, replace
from lander_ds.models.surgery import banks_of, routed_ffns

BITS: dict[Quantization, int] = {"int8": 8, "nf4": 4}
BLOCK = 64
"""Neighbouring weights that share a scale."""
SCALE_BYTES = 4


def quantizing(kind: Quantization, layers: nn.ModuleList, placement: Placement) -> Placement:
    """A placement that also quantises the units that are decoder layers, one at a time and where they were placed.

    Args:
        kind: of the codes.
        layers: the decoder layers; what is trained in them is marked already.
        placement: leaves weights whole.
    """

    quantised = set(layers)

    def place(unit: nn.Module) -> None:
        placement(unit)
        if unit in quantised:
            _quantize(unit, kind)

    return place


def quantized_parameters(layer: nn.Module) -> Iterator[nn.Parameter]:
    """The matrices of a decoder layer that are kept as codes."""
    for _, projection in _projections(layer):
        yield projection.get_parameter("weight")
    for _, bank in _frozen_banks(layer):
        yield from (parameter for parameter in bank.parameters() if parameter.dim() == 2)


def quantized_bytes(elements: int, kind: Quantization) -> int:
    """What a matrix of so many elements takes: codes, and a scale per block."""
    return math.ceil(elements * BITS[kind] / 8) + SCALE_BYTES * math.ceil(elements / BLOCK)


def _projections(layer: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The frozen linear projections, those under adapters too."""
    return [
        (name, module)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and not module.weight.requires_grad
    ]


def _frozen_banks(layer: nn.Module) -> list[tuple[RoutedFFN, BankFFN]]:
    """The last bank of every routed FFN that has one of kind frozen; there are others before it."""
    last = ((routed, banks_of(routed)[-1]) for _, routed in routed_ffns(layer))
    return [(routed, bank) for routed, bank in last if bank.kind == "frozen"]


def _quantize(layer: nn.Module, kind: Quantization) -> None:
    for name, projection in _projections(layer):
        replace(layer, name, QuantizedLinear(projection.weight, projection.bias, kind))
    for routed, bank in _frozen_banks(layer):
        routed.rest = QuantizedFFN(bank, routed.activation, kind)
        del routed.banks[-1]


class QuantizedLinear(nn.Module):
    """A frozen linear projection that holds codes and scales."""

    codes: nn.Parameter
    scales: nn.Parameter
    """Float32 as bytes: an engine gives every floating-point parameter the type of the model."""
    bias: nn.Parameter | None

    def __init__(self, weight: torch.Tensor, bias: nn.Parameter | None, kind: Quantization) -> None:
        """Round a weight [out, in] to codes, on its device."""
        super().__init__()
        self.kind = kind
        self.out_features, self.in_features = weight.shape
        codes, scales = _encoded(weight.detach(), kind)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(scales.view(torch.uint8), requires_grad=False)
        self.register_parameter("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        y: torch.Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias

    def weight_in(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [out, in] as the codes have it, made anew."""
        scales = self.scales.view(torch.float32)
        elements = self.out_features * self.in_features
        return _decoded(self.codes, scales, self.kind, elements, dtype).view(self.out_features, -1)


class QuantizedFFN(nn.Module):
    """The frozen neurons of a routed FFN, apart from its banks: no gate weighs them, no pair owns them."""

    def __init__(self, bank: BankFFN, activation: nn.Module, kind: Quantization) -> None:
        """Take over a frozen bank; the activation is the routed FFN's."""
        super().__init__()
        self.up = QuantizedLinear(bank.up, bank.bias, kind)
        self.down = QuantizedLinear(bank.down, None, kind)
        self.gate = None if bank.gate is None else QuantizedLinear(bank.gate, None, kind)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, d] -> [T, d]."""
        z = self.up(x)
        z = self.activation(z) if self.gate is None else self.activation(self.gate(x)) * z
        y: torch.Tensor = self.down(z)
        return y


class _Product(torch.autograd.Function):
    """x W^T for a W that neither pass leaves in memory."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, projection: QuantizedLinear) -> torch.Tensor:
        ctx.projection = projection
        return x @ projection.weight_in(x.dtype).t()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grads
        return grad @ ctx.projection.weight_in(grad.dtype), None


# bitsandbytes is an extra, so it is imported when it is needed. Matrices are handed over flat: with rows that are no
# multiple of a block its CPU kernel for 4 bits takes scales of other blocks.


def _encoded(weight: torch.Tensor, kind: Quantization) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (uint8, flat) and scales (float32, one per block) of a weight."""
    from bitsandbytes import functional  # noqa: PLC0415

    flat = weight.reshape(-1)
    if kind == "nf4":
        codes, state = functional.quantize_4bit(flat, blocksize=BLOCK, quant_type="nf4")
    else:
        codes, state = functional.quantize_blockwise(flat, code=_steps(flat.device), blocksize=BLOCK)
    return codes.reshape(-1), state.absmax


def _decoded(
    codes: torch.Tensor, scales: torch.Tensor, kind: Quantization, elements: int, dtype: torch.dtype
) -> torch.Tensor:
    """The weights again, flat."""
    from bitsandbytes import functional  # noqa: PLC0415

    if kind == "nf4":
        state = functional.QuantState(
            scales, shape=torch.Size([elements]), dtype=dtype, blocksize=BLOCK, quant_type="nf4"
        )
        weight: torch.Tensor = functional.dequantize_4bit(codes, state)
    else:
        state = functional.QuantState(scales, code=_steps(codes.device), dtype=dtype, blocksize=BLOCK)
        weight = functional.dequantize_blockwise(codes, state)
    return weight


@cache
def _steps(device: torch.device) -> torch.Tensor:
    """The 255 evenly spaced values from -1 to 1 (and one that is as good as 0) that 8 bits stand for, [256] float32: the
    library's own are spaced for moments of optimizers and round weights half as well again."""
    from bitsandbytes import functional  # noqa: PLC0415

    steps: torch.Tensor = functional.create_linear_map().to(device)
    return steps
