"""The random control that every claim about a selection needs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from lander_ds.method.selection import LayerSelection, Selection


def random_control(selection: Selection, seed: int) -> Selection:
    """A selection with the same layers and banks of the same sizes and owners, but neurons drawn at random.

    The draw depends on (seed, layer) only, so it does not change with the other layers that are selected.
    """
    remark = (
        f"Random control: the bank sizes are those of the criterion, the neurons are drawn with seed {seed}."
    )
    metadata = {**selection.metadata, "remarks": [*selection.metadata.get("remarks", []), remark]}
    return replace(
        selection, layers=tuple(_shuffled(layer, seed) for layer in selection.layers), metadata=metadata
    )


def _shuffled(layer: LayerSelection, seed: int) -> LayerSelection:
    drawn = np.random.default_rng([seed % 2**64, layer.layer]).permutation(len(layer.permutation))
    banks = torch.split(torch.from_numpy(drawn), [bank.size for bank in layer.banks])
    return replace(layer, permutation=torch.cat([bank.sort().values for bank in banks]))
