"""From awareness to a selection: layers, banks, and the order of the neurons. Needs no model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from lander_ds.common.errors import ArtefactError
from lander_ds.config.schema.method import SelectConfig
from lander_ds.method.awareness import Awareness
from lander_ds.method.control import random_control
from lander_ds.method.layers import choose_layers
from lander_ds.method.ownership import owners_of, shield_of
from lander_ds.method.relevance import relevance
from lander_ds.method.selection import Bank, LayerSelection, Selection

LATER = {
    "layers": ("cost_aware",),
    "banks": ("share", "quorum", "like", "owners"),
    "shield": ("awareness", "share"),
}
"""Options that version 0.1.0 did not have. At their defaults they are not in the file, so that an old recipe gives the very
file to which its checkpoints belong."""


def build_selection(
    awareness: Awareness, config: SelectConfig, seed: int, shield: Awareness | None = None
) -> Selection:
    """Choose the layers and divide their neurons into banks. Layers without an owned neuron are no part of the selection.

    In a layer that only some pairs selected (`scope: per_pair`) only these own neurons, and general means
    owned by all of them. The metadata holds `criteria` and `seed`, `base_fingerprint`, `data_hash`,
    `awareness_hash`, perhaps `shield_hash`, `relevance` (pair -> D of layers 0 to L - 2), `layer_pairs` (layer -> pairs that
    selected it), `bank_sizes` (layer -> group -> neurons) and `remarks` for the report.

    Args:
        awareness: of the pairs.
        config: `select` of the recipe.
        seed: of what is random.
        shield: the awareness that `select.shield` names.

    Raises:
        ConfigError: `select` asks for something this awareness cannot give.
        ArtefactError: the shield is of another base.
    """
    if shield is not None:
        _check_shield(shield, awareness)
    candidates = choose_layers(awareness, config.layers, seed)
    shielded = None if shield is None else shield_of(shield, config.shield.share)
    owners = owners_of(awareness, candidates, config.banks, shielded)
    layer_pairs = {layer: pairs for layer, pairs in candidates.items() if layer in owners}
    layers = [divide(layer, owners[layer], pairs) for layer, pairs in layer_pairs.items()]
    metadata = {
        "criteria": _criteria(config),
        "seed": seed,
        "base_fingerprint": awareness.metadata.base_fingerprint,
        "data_hash": awareness.metadata.data_hash,
        "awareness_hash": awareness.content_hash(),
        "relevance": dict(zip(awareness.pairs, relevance(awareness).tolist(), strict=True)),
        "layer_pairs": {str(layer): list(pairs) for layer, pairs in layer_pairs.items()},
        "bank_sizes": {str(layer.layer): {bank.group: bank.size for bank in layer.banks} for layer in layers},
        "remarks": _remarks(awareness.pairs, candidates, layers),
    }
    if shield is not None:
        metadata["shield_hash"] = shield.content_hash()
    selection = Selection(awareness.pairs, awareness.neurons, tuple(layers), metadata)
    return random_control(selection, seed) if config.banks.criterion == "random" else selection


def _criteria(config: SelectConfig) -> dict[str, dict[str, Any]]:
    """The options as JSON values."""
    criteria, default = (json.loads(json.dumps(asdict(one))) for one in (config, SelectConfig()))
    for section, names in LATER.items():
        for name in names:
            if criteria[section][name] == default[section][name]:
                del criteria[section][name]
    return {section: options for section, options in criteria.items() if options}


def _check_shield(shield: Awareness, awareness: Awareness) -> None:
    one, other = shield.metadata.base_fingerprint, awareness.metadata.base_fingerprint
    if one != other or shield.sum_h.shape[1:] != awareness.sum_h.shape[1:]:
        raise ArtefactError(
            f"select.shield.awareness was collected from another base model ({one}) than the run's awareness "
            f"({other}): run stage detect of that recipe with this model.path"
        )


def divide(layer: int, owners: torch.Tensor, pairs: Sequence[str]) -> LayerSelection:
    """Order a layer's neurons as [general | specific banks | frozen], by index inside each bank.

    Specific banks of fewer owners come first, then in the order of their owners. A single pair's neurons are
    specific, never general. Banks without neurons do not exist.

    Args:
        layer: index of the decoder layer.
        owners: [M, f] bool.
        pairs: the M pairs that selected the layer.
    """
    patterns, bank_of = torch.unique(owners, dim=1, return_inverse=True)
    ordered = []
    for number, pattern in enumerate(patterns.T.tolist()):
        ids = tuple(row for row, owned in enumerate(pattern) if owned)
        general = len(ids) == len(pairs) > 1
        kind = 0 if general else 1 if ids else 2
        ordered.append(((kind, len(ids), ids), torch.nonzero(bank_of == number).squeeze(1)))
    ordered.sort(key=lambda item: item[0])
    banks = tuple(
        Bank(("general", "specific", "frozen")[kind], tuple(pairs[row] for row in ids), len(neurons))
        for (kind, _, ids), neurons in ordered
    )
    return LayerSelection(layer, torch.cat([neurons for _, neurons in ordered]), banks)


def _remarks(
    pairs: tuple[str, ...], layer_pairs: dict[int, tuple[str, ...]], layers: Sequence[LayerSelection]
) -> list[str]:
    remarks = []
    if len(pairs) == 1:
        remarks.append(
            f"There is one pair, {pairs[0]}: every trained neuron is specific to it, none is general."
        )
    if untouched := sorted(layer_pairs.keys() - {layer.layer for layer in layers}):
        names = ", ".join(map(str, untouched))
        remarks.append(f"No neuron of the layers {names} is owned by any pair: they stay as they are.")
    with_specific: set[str] = set()
    for layer in layers:
        selected_by = layer_pairs[layer.layer]
        if len(selected_by) == 1 < len(pairs):
            remarks.append(
                f"Layer {layer.layer} was selected by {selected_by[0]} alone: it has no general bank."
            )
        specific = [bank for bank in layer.banks if bank.kind == "specific"]
        if not specific:
            remarks.append(
                f"Layer {layer.layer} has no specific bank: no neuron prefers a pair by this criterion."
            )
        with_specific.update(pair for bank in specific for pair in bank.owners)
    remarks.extend(
        f"Pair {pair} has no specific neuron in any layer." for pair in pairs if pair not in with_specific
    )
    return remarks
