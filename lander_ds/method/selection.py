"""The selection: which layers are trained and which bank each of their neurons belongs to, and its file.

`selection.safetensors` holds, per selected layer `layers.{i}.permutation` [f] and `layers.{i}.bank_of` [f],
and JSON metadata with pairs, banks, criteria and the hashes of what it was made from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from lander_ds.common import tensor_file as artefact_file

FORMAT = "lander-selection-1"
BankKind = Literal["general", "specific", "frozen"]


@dataclass(frozen=True)
class Bank:
    """The neurons of a layer that the same set of language pairs owns."""

    kind: BankKind
    """`general` is owned by every pair that selected the layer; `frozen` by none."""
    owners: tuple[str, ...]
    """Language pairs, in the selection's order; empty for frozen."""
    size: int
    """Number of neurons; never 0."""

    @property
    def group(self) -> str:
        """Name of the bank's parameter group, e.g. `specific:en-de+en-fr`, `frozen`."""
        return self.kind if self.kind == "frozen" else f"{self.kind}:{'+'.join(self.owners)}"


@dataclass(frozen=True)
class LayerSelection:
    """One selected layer. Neurons are reordered so that every bank is contiguous."""

    layer: int
    """Index of the decoder layer, from 0."""
    permutation: torch.Tensor
    """[f] int64: new position -> old neuron index; general first, then specific banks, then frozen."""
    banks: tuple[Bank, ...]
    """Banks in the order of their neurons in `permutation`; sizes sum to f."""

    def slices(self) -> list[torch.Tensor]:
        """Old neuron indices of each bank: a list of int64 tensors [size]."""
        return list(torch.split(self.permutation, [bank.size for bank in self.banks]))

    def bank_of(self) -> torch.Tensor:
        """[f] int64: old neuron index -> position of its bank in `banks`."""
        owner = torch.empty_like(self.permutation)
        for number, neurons in enumerate(self.slices()):
            owner[neurons] = number
        return owner


@dataclass(frozen=True)
class Selection:
    """Everything that surgery needs to know."""

    pairs: tuple[str, ...]
    """Language pairs; a pair's position is its pair id."""
    neurons: int
    """f, neurons per layer."""
    layers: tuple[LayerSelection, ...]
    """Selected layers by ascending index."""
    metadata: Mapping[str, Any]
    """JSON values: criteria, `base_fingerprint`, `awareness_hash`, `remarks`; see `build_selection`."""

    def layer(self, index: int) -> LayerSelection:
        """The selection of decoder layer `index` (KeyError when it is not selected)."""
        for layer in self.layers:
            if layer.layer == index:
                return layer
        raise KeyError(index)

    def save(self, path: Path) -> None:
        """Write the selection to a temporary name and rename it to `path`."""
        tensors: dict[str, torch.Tensor] = {}
        for layer in self.layers:
            tensors[f"layers.{layer.layer}.permutation"] = layer.permutation.contiguous()
            tensors[f"layers.{layer.layer}.bank_of"] = layer.bank_of().contiguous()
        description = {
            "format": FORMAT,
            "pairs": list(self.pairs),
            "neurons": self.neurons,
            "layers": [
                {
                    "layer": layer.layer,
                    "banks": [
                        {"kind": b.kind, "owners": list(b.owners), "size": b.size} for b in layer.banks
                    ],
                }
                for layer in self.layers
            ],
            "metadata": dict(self.metadata),
        }
        artefact_file.write(path, "selection", tensors, json.dumps(description, sort_keys=True))

    @staticmethod
    def load(path: Path) -> Selection:
        """Read a selection.

        Raises:
            ArtefactError: the file is missing, damaged, not a selection, or its banks do not fit its neurons.
        """
        cure = "run stage select (again)"
        keys = ("pairs", "neurons", "layers", "metadata")
        with artefact_file.reading(path, "selection", FORMAT, cure, keys) as (file, description):
            layers = tuple(
                LayerSelection(
                    entry["layer"],
                    file.get_tensor(f"layers.{entry['layer']}.permutation"),
                    tuple(Bank(b["kind"], tuple(b["owners"]), b["size"]) for b in entry["banks"]),
                )
                for entry in description["layers"]
            )
            stored = [file.get_tensor(f"layers.{layer.layer}.bank_of") for layer in layers]
            selection = Selection(
                tuple(description["pairs"]), description["neurons"], layers, description["metadata"]
            )
            if fault := _fault(selection, stored):
                raise ValueError(fault)
        return selection


def _fault(selection: Selection, bank_of: Sequence[torch.Tensor]) -> str | None:
    """What contradicts itself in a selection from a file with these `bank_of` [f] per layer, or None."""
    everyone = torch.arange(selection.neurons)
    indices = [layer.layer for layer in selection.layers]
    if indices != sorted(set(indices)):
        return "layers are not in ascending order"
    for layer, stored in zip(selection.layers, bank_of, strict=True):
        where = f"layer {layer.layer}"
        if not torch.equal(layer.permutation.sort().values, everyone):
            return f"{where}: the permutation does not hold each of {selection.neurons} neurons once"
        if (
            min(bank.size for bank in layer.banks) < 1
            or sum(b.size for b in layer.banks) != selection.neurons
        ):
            return f"{where}: the bank sizes do not sum to {selection.neurons} neurons"
        if not torch.equal(layer.bank_of(), stored):
            return f"{where}: bank_of contradicts the permutation"
        for bank in layer.banks:
            if bank.kind not in get_args(BankKind) or (bank.kind == "frozen") != (not bank.owners):
                return f"{where}: {bank.kind} bank with {len(bank.owners)} owners"
            if not set(bank.owners) <= set(selection.pairs):
                return f"{where}: a bank is owned by {', '.join(bank.owners)}, not all of them selected pairs"
    return None
