"""Awareness made of chosen numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lander_ds.method.awareness import Awareness, AwarenessMetadata

PAIRS = ("en-de", "en-fr", "en-ru", "en-cs")


def awareness(
    phi: torch.Tensor | Sequence[object],
    mean: torch.Tensor | Sequence[object] | None = None,
    probability: torch.Tensor | Sequence[object] | None = None,
    pairs: Sequence[str] | None = None,
) -> Awareness:
    """Awareness of these Phi, activation means (default Phi), probabilities (default 0): all [M, L, f]."""
    values = torch.as_tensor(phi, dtype=torch.float64)
    names = tuple(pairs) if pairs is not None else PAIRS[: len(values)]
    tokens = 100.0 * torch.arange(1, len(values) + 1, dtype=torch.float64)

    def total(per_token: torch.Tensor | Sequence[object]) -> torch.Tensor:
        return torch.as_tensor(per_token, dtype=torch.float64) * tokens[:, None, None]

    sum_h = total(values if mean is None else mean)
    return Awareness(
        pairs=names,
        tokens=tokens,
        sum_h=sum_h,
        sum_abs_h=sum_h.abs(),
        active=total(torch.zeros_like(values) if probability is None else probability),
        sum_abs_gh=total(values),
        sum_gh2=total(values.square()),
        metadata=AwarenessMetadata("base", "data", dict.fromkeys(names, 8), dict.fromkeys(names, 64)),
    )


def random_awareness(pairs: int = 4, layers: int = 6, neurons: int = 40, seed: int = 0) -> Awareness:
    """Random Phi > 0, activation means and probabilities."""
    generator = torch.Generator().manual_seed(seed)
    shape = (pairs, layers, neurons)
    phi, probability = (torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return awareness(phi, torch.randn(shape, generator=generator, dtype=torch.float64), probability)
