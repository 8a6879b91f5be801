"""The selection: which layers are trained and which bank each of their neurons belongs to, and its file.

`selection.safetensors` holds, per selected layer `layers.{i}.permutation` [f] and `layers.{i}.bank_of` [f], and JSON
metadata with pairs, banks, criteria and the hashes of what it was made from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lander_ds.errors import ArtefactError

FORMAT = "lander-selection-1"


@dataclass(frozen=True)
class Bank:
    """The neurons of a layer that the same set of language pairs owns."""

    kind: Literal["general", "specific", "frozen"]
    """`general` is owned by every pair that selected the layer; `frozen` by none."""
    owners: tuple[str, ...]
    """Language pairs, in the selection's order; empty for frozen."""
    size: int
    """Number of neurons; never 0."""

    @property
    def group(self) -> str:
        """Name of the bank's parameter group, e.g. `general`, `specific:en-de`, `specific:en-de+en-fr`, `frozen`."""
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
    """JSON values: criteria and their parameters, `base_fingerprint`, `awareness_hash`, remarks for the report."""

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
            "pairs": list(self.pairs),
            "neurons": self.neurons,
            "layers": [
                {
                    "layer": layer.layer,
                    "banks": [{"kind": b.kind, "owners": list(b.owners), "size": b.size} for b in layer.banks],
                }
                for layer in self.layers
            ],
            "metadata": dict(self.metadata),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        save_file(tensors, temporary, metadata={"format": FORMAT, "selection": json.dumps(description)})
        temporary.replace(path)

    @staticmethod
    def load(path: Path) -> Selection:
        """Read a selection.

        Raises:
            ArtefactError: the file is missing, damaged or not a selection.
        """
        cure = "run stage select (again)"
        if not path.exists():
            raise ArtefactError(f"{path} does not exist: {cure}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ArtefactError(f"{path} is not a {FORMAT} file: {cure}")
                description = json.loads(metadata["selection"])
                layers = tuple(
                    LayerSelection(
                        entry["layer"],
                        file.get_tensor(f"layers.{entry['layer']}.permutation"),
                        tuple(Bank(b["kind"], tuple(b["owners"]), b["size"]) for b in entry["banks"]),
                    )
                    for entry in description["layers"]
                )
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ArtefactError(f"{path} is damaged ({error}): {cure}") from None
        return Selection(tuple(description["pairs"]), description["neurons"], layers, description["metadata"])
