"""One small routed FFN with random weights, and the formulas of the method written out literally."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from lander_ds.models.routed_ffn import BankFFN, Gate, GateSink, RoutedFFN, Routing, routed

D, PAIRS = 6, ("en-de", "en-fr", "de-en")
BANKS: tuple[tuple[str, tuple[int, ...], int], ...] = (
    ("general", (0, 1, 2), 5),
    ("specific", (0,), 3),
    ("specific", (1,), 2),
    ("specific", (0, 2), 4),
    ("frozen", (), 3),
)
"""(kind, owners, neurons); pair 2 owns no bank alone."""


def small_ffn(
    gated: bool = True,
    gate: str = "input",
    gate_init: str = "preserve",
    gate_eval: str = "soft",
    other_pairs: str = "keep",
    banks: Sequence[tuple[str, tuple[int, ...], int]] = BANKS,
    layer: int = 3,
    dtype: torch.dtype = torch.float64,
) -> RoutedFFN:
    """Random banks whose parameters all train, and a gate that is not at its starting point."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    modules = [
        BankFFN(
            kind,
            owners,
            draw(n, D),
            draw(D, n),
            draw(n, D) if gated else None,
            None if gated else draw(n),
        )
        for kind, owners, n in banks
    ]
    for module in modules:
        module.requires_grad_(module.kind != "frozen")
    output_bias = None if gated else draw(D)
    router = None if gate == "none" else Gate(draw(4, D), draw(4), draw(1, 4) * 0.3, draw(1) * 0.3)
    options = {"gate": gate, "gate_init": gate_init, "gate_eval": gate_eval, "other_pairs": other_pairs}
    activation = nn.SiLU() if gated else nn.GELU()
    return RoutedFFN(layer, modules, activation, output_bias, router, options, PAIRS)


def run(
    ffn: RoutedFFN,
    x: torch.Tensor,
    pair_ids: torch.Tensor,
    noise_keys: torch.Tensor | None = None,
    alpha: float = 0.0,
    gates: GateSink | None = None,
) -> torch.Tensor:
    """The FFN's output for tokens of these pairs."""
    with routed(Routing(pair_ids, noise_keys, alpha), gates):
        output: torch.Tensor = ffn(x)
    return output


def bank_by_hand(bank: BankFFN, x: torch.Tensor) -> torch.Tensor:
    """FFN_bank(x) of the method: [T, d] -> [T, d], without the output bias."""
    if bank.gate is not None:
        return (functional.silu(x @ bank.gate.T) * (x @ bank.up.T)) @ bank.down.T
    assert bank.bias is not None
    return functional.gelu(x @ bank.up.T + bank.bias) @ bank.down.T


def whole_by_hand(ffn: RoutedFFN, x: torch.Tensor) -> torch.Tensor:
    """The plain FFN over all neurons at once."""
    banks = [bank for bank in ffn.banks if isinstance(bank, BankFFN)]
    up, down = torch.cat([bank.up for bank in banks]), torch.cat([bank.down for bank in banks], 1)
    if banks[0].gate is not None:
        gate = torch.cat([bank.gate for bank in banks if bank.gate is not None])
        return (functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    bias = torch.cat([bank.bias for bank in banks if bank.bias is not None])
    assert ffn.output_bias is not None
    return functional.gelu(x @ up.T + bias) @ down.T + ffn.output_bias


def c_by_hand(ffn: RoutedFFN, x: torch.Tensor) -> torch.Tensor:
    """c [T, 1] of the gate, without noise."""
    router = ffn.router
    assert router is not None
    return torch.sigmoid(torch.relu(x @ router.w1.T + router.b1) @ router.w2.T + router.b2)


def tokens(count: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """(x [T, d], pair ids [T]) with every pair among them."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(count, D, generator=generator, dtype=torch.float64)
    return x, torch.arange(count) % len(PAIRS)
