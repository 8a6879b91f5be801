"""A delta: what a training (or any fine-tuning) changed in a base, and nothing else.

    delta.json             format, base (fingerprint, config.json, headers of its weight files), changes, routing, facts
    delta.safetensors      bits/NAME    old XOR new of the base tensor NAME, as integers: its changed rows or columns
                           index/NAME   which rows or columns, int32 (absent: the whole tensor)
                           gate/NAME    gates, by their name in the routed model
    selection.safetensors  layers and banks, where there are gates or banks

Bits serve both directions: base to model and model to base, exactly. What a delta is applied to is recognised by the
hashes of the tensors that it touches.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from lander_ds.common.errors import ArtefactError
from lander_ds.common.files import file_hash, inside, read_json
from lander_ds.config.recipe import ModelConfig
from lander_ds.config.schema.method import RoutingConfig
from lander_ds.export.bits import Slices, flipped, tensor_hash
from lander_ds.export.sources import Tensors, kind_of, rounded
from lander_ds.export.trained import TrainedModel, is_gate
from lander_ds.method.selection import Selection
from lander_ds.models.loading import build
from lander_ds.models.surgery import install
from lander_ds.models.weights import BaseWeights

FORMAT = "lander-delta-1"
META, WEIGHTS, SELECTION = "delta.json", "delta.safetensors", "selection.safetensors"
BITS, INDEX, GATE = "bits/", "index/", "gate/"
_CURE = "copy the delta again, or export it again"


@dataclass(frozen=True)
class Change:
    """How one base tensor changed."""

    tensor: str
    """Its name on disk."""
    dtype: str
    shape: tuple[int, ...]
    dim: int | None
    """0: rows changed, 1: columns, None: the whole tensor."""
    count: int
    """How many of them."""
    before: str
    """SHA-256 of the base's tensor."""
    after: str
    """SHA-256 of the changed tensor."""


@dataclass(frozen=True)
class Delta:
    """A delta on disk."""

    path: Path
    meta: Mapping[str, Any]
    """delta.json."""
    changes: Mapping[str, Change]
    """By the tensor's name."""

    @staticmethod
    def open(path: Path) -> Delta:
        """Read and check a delta.

        Raises:
            ArtefactError: it is missing, damaged, or not what was written.
        """
        meta = read_json(
            path / META, "give a directory that export.formats: [delta] or lander delta diff has written"
        )
        if not isinstance(meta, dict) or meta.get("format") != FORMAT:
            raise ArtefactError(f"{path} is not a {FORMAT} directory: {_CURE}")
        try:
            changes, files = _changes(meta), dict(meta["files"])
            wanted = {WEIGHTS} | ({SELECTION} if _routing(meta) else set())
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtefactError(f"{path / META} is damaged ({error!r}): {_CURE}") from None
        for name, digest in {**dict.fromkeys(wanted, ""), **files}.items():
            file = inside(path, name, path / META)
            if not file.is_file() or file_hash(file) != digest:
                raise ArtefactError(f"{file} is missing or not what was written: {_CURE}")
        return Delta(path, meta, changes)

    @property
    def fingerprint(self) -> str:
        """Of the base it was made from."""
        return str(self.meta["base"]["fingerprint"])

    @cached_property
    def _file(self) -> Any:
        try:
            return safe_open(self.path / WEIGHTS, framework="pt")
        except SafetensorError as error:
            raise ArtefactError(f"{self.path / WEIGHTS} is damaged ({error}): {_CURE}") from None

    def gates(self) -> dict[str, torch.Tensor]:
        """Parameter name -> values."""
        names = [name for name in self._file.keys() if name.startswith(GATE)]  # noqa: SIM118
        return {name.removeprefix(GATE): self._file.get_tensor(name) for name in names}

    def flip(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor `name` after the change, given the one before it, or the other way round."""
        change = self.changes[name]
        try:
            bits = self._file.get_tensor(BITS + name)
            index = None if change.dim is None else self._file.get_tensor(INDEX + name)
            return flipped(tensor, bits, Slices(change.dim, index))
        except (SafetensorError, RuntimeError, IndexError) as error:
            raise ArtefactError(f"{self.path}: the change of {name} is damaged ({error}): {_CURE}") from None

    def check(self, tensors: Tensors, where: Path, back: bool) -> None:
        """Refuse to change what this delta was not made for, before anything is written.

        Args:
            tensors: what it is to change.
            where: their directory, for messages.
            back: whether it is to be taken off, not put on.

        Raises:
            ArtefactError: a tensor that the delta touches is missing or another one.
        """
        for name, change in self.changes.items():
            first, second = (change.after, change.before) if back else (change.before, change.after)
            if name not in tensors:
                raise ArtefactError(
                    f"{where} lacks the tensor {name}, which {self.path} changes: {self._wrong(back)}"
                )
            tensor = tensors.read(name)
            digest = "" if tuple(tensor.shape) != change.shape else tensor_hash(tensor)
            if digest == second:
                done = "does not contain this delta" if back else "contains this delta already"
                raise ArtefactError(f"{where} {done} ({name} says so): there is nothing to do")
            if digest != first:
                raise ArtefactError(
                    f"{where}: {name} is another tensor than {self.path} expects: {self._wrong(back)}"
                )
            if tensor_hash(self.flip(name, tensor)) != second:
                raise ArtefactError(
                    f"{self.path}: the change of {name} does not lead where it should: {_CURE}"
                )

    def _wrong(self, back: bool) -> str:
        if back:
            return (
                "give the model that `lander delta apply` (without --fold, --dense and --dtype) made from this delta; "
                "other models cannot be taken back"
            )
        return (
            f"give the base it was made from ({self.meta['base'].get('name')}, {self.fingerprint}), unchanged"
        )

    def trained(self, weights: BaseWeights) -> TrainedModel:
        """The routed model that this delta makes of its base.

        Raises:
            ArtefactError: the delta has no banks.
        """
        routing = self.routing()
        if routing is None:
            raise ArtefactError(f"{self.path} has no gates or banks: it has only a dense form")
        model_config = ModelConfig(
            str(weights.directory), dtype=self.meta["dtype"], allow_pickle=weights.layout.pickled
        )
        model, family = build(model_config, attention=None)
        selection, gates = self.selection(), self.gates()
        install(model, family, selection, routing, seed=0)
        if {name for name, _ in model.named_parameters() if is_gate(name)} != gates.keys():
            raise ArtefactError(f"{self.path} has other gates than its selection needs: {_CURE}")
        source = Flipped(weights, self)
        return TrainedModel(model, family, source, gates, "lander", routing, selection, self.fingerprint)

    def selection(self) -> Selection:
        """Layers and banks."""
        return Selection.load(self.path / SELECTION)

    def routing(self) -> RoutingConfig | None:
        """Options of the gates; None where there are no banks."""
        return _routing(self.meta)


@dataclass(frozen=True)
class Flipped:
    """A base with a delta on it (a `TensorSource`)."""

    weights: BaseWeights
    delta: Delta

    def changed(self) -> Set[str]:
        """See `TensorSource`."""
        return self.delta.changes.keys()

    def tensor(self, stored: str, dtype: torch.dtype | None) -> torch.Tensor:
        """See `TensorSource`."""
        base = self.weights.read(stored)
        values = self.delta.flip(stored, base) if stored in self.delta.changes else base
        return rounded(stored, values, kind_of(base, dtype))


def _changes(meta: Mapping[str, Any]) -> dict[str, Change]:
    base, facts = meta["base"], meta["facts"]
    texts = (
        base["fingerprint"],
        base["config"],
        facts["base"]["name"],
        facts["method"],
        *(base["files"] or ()),
    )
    if not all(isinstance(text, str) for text in texts) or not isinstance(meta["gate_means"], dict):
        raise ValueError("a value of another type")
    return {entry["tensor"]: Change(**{**entry, "shape": tuple(entry["shape"])}) for entry in meta["changes"]}


def _routing(meta: Mapping[str, Any]) -> RoutingConfig | None:
    if meta["routing"] is None:
        return None
    if meta["dtype"] not in get_args(get_type_hints(ModelConfig)["dtype"]):
        raise ValueError(f"dtype {meta['dtype']!r}")
    try:
        return RoutingConfig(**meta["routing"])
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"routing.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
