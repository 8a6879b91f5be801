"""Which pairs own each neuron of all chosen layers: pairs are put into groups, a criterion divides the neurons among the
groups, and what a group owns all its pairs own.

Shapes: M pairs, G groups, L layers of the model, K chosen layers, f neurons per layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from lander_ds.common.errors import ConfigError
from lander_ds.config.schema.method import BankChoice
from lander_ds.method.awareness import Awareness
from lander_ds.method.banks import assign_owners, top_owners


def owners_of(
    awareness: Awareness,
    layer_pairs: Mapping[int, Sequence[str]],
    choice: BankChoice,
    shielded: torch.Tensor | None = None,
) -> dict[int, torch.Tensor]:
    """Owners of the neurons of every chosen layer: [pairs that selected it, f] bool.

    `random` gives those of the criterion whose sizes it has. Layers in which nobody owns a neuron are left out.

    Args:
        awareness: of the pairs.
        layer_pairs: chosen layer -> pairs that selected it.
        choice: the criterion.
        shielded: [L, f] bool: neurons that nobody owns, and that the criterion does not see.

    Raises:
        ConfigError: `top` chooses no neuron at all.
    """
    if choice.criterion == "random":
        choice = replace(choice, criterion=choice.like)
    if choice.criterion == "top":
        return _top_of_all(awareness, layer_pairs, choice, shielded)
    phi, active = awareness.sum_abs_gh, awareness.active
    owners = {}
    for layer, pairs in layer_pairs.items():
        rows = [awareness.pairs.index(pair) for pair in pairs]
        members = _members(pairs, choice)
        tokens = awareness.tokens[rows]
        aware, probability = (_pooled(total[rows, layer], tokens, members) for total in (phi, active))
        free = slice(None) if shielded is None else ~shielded[layer]
        owned = torch.zeros_like(aware, dtype=torch.bool)
        if aware[:, free].numel():
            owned[:, free] = assign_owners(aware[:, free], probability[:, free], choice)
            owners[layer] = _of_pairs(owned, members)
    return owners


def shield_of(awareness: Awareness, share: float) -> torch.Tensor:
    """The floor(share L f) neurons (l, j) with the largest sum over m of Phi[m, l, j] / sum over (l, j) of Phi[m]: those on
    which the pairs of another awareness depend most (I). The lower layer and index first among equals.

    Returns: [L, f] bool.

    Raises:
        ConfigError: not one neuron is shielded.
    """
    phi = awareness.phi()
    total = torch.nan_to_num(phi / phi.sum((1, 2), keepdim=True)).sum(0)
    count = math.floor(share * total.numel() + 1e-9)
    if count < 1:
        raise ConfigError(f"select.shield.share: {share:g} of {total.numel()} neurons is not one; raise it")
    shielded = torch.zeros(total.numel(), dtype=torch.bool)
    shielded[torch.sort(total.flatten(), descending=True, stable=True).indices[:count]] = True
    return shielded.view_as(total)


def group_of(pair: str, owners: str) -> str:
    """The group of a pair: itself, or its `target` or `source` language."""
    source, _, target = pair.partition("-")
    return {"pair": pair, "source": source, "target": target}[owners]


def _members(pairs: Sequence[str], choice: BankChoice) -> list[list[int]]:
    """Rows of the pairs of every group, in the order in which the groups appear."""
    rows: dict[str, list[int]] = {}
    for row, pair in enumerate(pairs):
        rows.setdefault(group_of(pair, choice.owners), []).append(row)
    return list(rows.values())


def _pooled(total: torch.Tensor, tokens: torch.Tensor, members: Sequence[Sequence[int]]) -> torch.Tensor:
    """Means over all tokens of the pairs of a group, as if they were one pair: [G, f] of sums [M, f]."""
    return torch.stack([total[rows].sum(0) / tokens[rows].sum() for rows in members])


def _of_pairs(owned: torch.Tensor, members: Sequence[Sequence[int]]) -> torch.Tensor:
    """[M, f] of owners [G, f]."""
    group = {row: number for number, rows in enumerate(members) for row in rows}
    return owned[[group[row] for row in range(len(group))]]


def _top_of_all(
    awareness: Awareness,
    layer_pairs: Mapping[int, Sequence[str]],
    choice: BankChoice,
    shielded: torch.Tensor | None,
) -> dict[int, torch.Tensor]:
    members = _members(awareness.pairs, choice)
    phi = torch.zeros(len(members), len(layer_pairs), awareness.neurons, dtype=torch.float64)
    takes_part = torch.zeros(phi.shape[:2], dtype=torch.bool)
    for column, (layer, pairs) in enumerate(layer_pairs.items()):
        for group, rows in enumerate(members):
            here = [row for row in rows if awareness.pairs[row] in pairs]
            if here:
                takes_part[group, column] = True
                phi[group, column] = _pooled(awareness.sum_abs_gh[:, layer], awareness.tokens, [here])[0]
    if shielded is not None:
        phi[:, shielded[list(layer_pairs)]] = 0.0
    owned = top_owners(phi, takes_part, choice.share, choice.quorum)
    if not owned.any():
        raise ConfigError(
            f"select.banks.share: {choice.share:g} of the {phi[0].numel()} neurons of the chosen layers is not one "
            "that any pair is aware of; raise it"
        )
    owners = {}
    for column, (layer, pairs) in enumerate(layer_pairs.items()):
        rows = [awareness.pairs.index(pair) for pair in pairs]
        of_pairs = _of_pairs(owned[:, column], members)[rows]
        if of_pairs.any():
            owners[layer] = of_pairs
    return owners
