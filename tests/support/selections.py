"""Selections made up for tests."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from lander_ds.method.selection import Bank, LayerSelection, Selection

PAIRS = ("en-de", "en-fr", "de-en")


def random_selection(
    neurons: int, layers: Sequence[int], pairs: Sequence[str] = PAIRS, seed: int = 0, frozen: bool = True
) -> Selection:
    """A selection with banks of every kind; which neuron belongs where is random, by layer.

    General, one specific bank per pair, one that two pairs share (from three pairs on), and frozen neurons.
    """
    generator = torch.Generator().manual_seed(seed)
    owners: list[tuple[str, tuple[str, ...]]] = [("general", tuple(pairs))]
    owners += [("specific", (pair,)) for pair in pairs]
    if len(pairs) > 2:
        owners.append(("specific", (pairs[0], pairs[-1])))
    if frozen:
        owners.append(("frozen", ()))
    chosen = []
    for layer in layers:
        sizes = _sizes(neurons, len(owners), generator)
        banks = tuple(Bank(kind, who, size) for (kind, who), size in zip(owners, sizes, strict=True))  # type: ignore[arg-type]
        chosen.append(LayerSelection(layer, torch.randperm(neurons, generator=generator), banks))
    return Selection(tuple(pairs), neurons, tuple(chosen), {})


def _sizes(total: int, parts: int, generator: torch.Generator) -> list[int]:
    """`parts` sizes of at least 1 that sum to `total`."""
    cuts = torch.randperm(total - 1, generator=generator)[: parts - 1].sort().values + 1
    edges = [0, *cuts.tolist(), total]
    return [end - start for start, end in pairwise(edges)]
