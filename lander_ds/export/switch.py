"""One base in memory, many deltas: each is put on for a request and taken off after it, without another model."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from lander_ds.common.errors import ArtefactError, ModelError
from lander_ds.export.delta import Delta, Flipped
from lander_ds.export.pieces import whole
from lander_ds.export.trained import TrainedModel
from lander_ds.models.catalogue import family_of
from lander_ds.models.experts import unstack
from lander_ds.models.family import Family
from lander_ds.models.routed_ffn import NONE, Routing, pair_id, routed
from lander_ds.models.surgery import install, routed_ffns
from lander_ds.models.weights import BaseWeights


@dataclass(frozen=True)
class _Added:
    """What a delta puts in place of parts of the base."""

    layers: Mapping[int, nn.Module]
    """Decoder layer -> one with a routed FFN; everything else in it is the base's own."""
    pairs: tuple[str, ...]
    """That its routed FFNs know; none without gates."""
    tensors: Mapping[str, torch.Tensor]
    """Parameter name -> changed values."""


class Switch:
    """A base model for inference, and the deltas that it can take on.

    A delta with gates costs memory for the FFNs of its layers, another one for the tensors that it changes. Putting one
    on exchanges references and copies nothing. One delta is on at a time: threads that want another one wait.
    """

    def __init__(self, model: PreTrainedModel, directory: Path, allow_pickle: bool = False) -> None:
        """Start with the plain base.

        Args:
            model: the base, as `AutoModelForCausalLM.from_pretrained(directory)` gives it, in any type, on one device.
                Its parameters are frozen.
            directory: where it comes from.
            allow_pickle: open a pickled base.

        Raises:
            ModelError: the family is unknown, or the model is spread over devices.
        """
        self.model: PreTrainedModel = model.eval().requires_grad_(False)
        self._weights = BaseWeights(directory, allow_pickle)
        self._family: Family = family_of(model.config.model_type)
        unstack(self.model)
        if any(hasattr(module, "_hf_hook") for module in model.modules()):
            raise ModelError(
                f"{directory} is spread over several devices or offloaded: load it on one device, without device_map"
            )
        self._added: dict[str, _Added] = {}
        self._base_layers = tuple(self._layers)
        self._base_tensors: dict[str, torch.Tensor] = {}
        self._lock = threading.RLock()
        self._changing = False

    @property
    def _layers(self) -> nn.ModuleList:
        return self._family.layers_of(self.model)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the deltas that were added."""
        return tuple(self._added)

    def add(self, name: str, path: Path) -> None:
        """Read a delta; it is not put on yet.

        Args:
            name: what `using` will call it; an earlier delta of that name is replaced.
            path: its directory.

        Raises:
            ArtefactError: it is damaged, or belongs to another base; or this thread is inside `using`.
        """
        delta = Delta.open(path)
        delta.check(self._weights, self._weights.directory, back=False)
        trained = delta.trained(self._weights) if delta.routing() is not None else None
        with self._alone():
            if trained is not None and trained.pairs_differ:
                self._added[name] = self._routed(delta, trained)
            else:
                self._added[name] = _Added({}, (), self._changed(delta))

    def remove(self, name: str) -> None:
        """Forget a delta and free its memory; not inside `using`."""
        with self._alone():
            del self._added[name]

    @contextmanager
    def using(self, name: str, pair: str | Sequence[str] | None = None) -> Iterator[PreTrainedModel]:
        """Inside, the model (`forward`, `generate`) is what the delta makes of the base.

        The pair is known to this thread; a thread that is started inside needs its context
        (`contextvars.copy_context().run`).

        Args:
            name: of a delta that was added.
            pair: for deltas with gates: the language pair, or one per row of the batch; `none` in a direction that the
                delta was not trained for.

        Raises:
            ArtefactError: there is no such delta; or it needs a pair, and this is none of its pairs; or this thread is
                inside `using` already.
        """
        with self._alone():
            if name not in self._added:
                raise ArtefactError(
                    f"no delta {name!r} was added: there are {', '.join(self._added) or 'none'}"
                )
            added = self._added[name]
            following: AbstractContextManager[None] = nullcontext()
            if added.pairs:
                following = routed(Routing(self._pair_ids(name, added.pairs, pair)))
            try:
                self._put(added)
                with following:
                    yield self.model
            finally:
                self._put_base(added)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Other threads wait; this one must not come here twice, because the base would then be lost."""
        with self._lock:
            if self._changing:
                raise ArtefactError(
                    "a delta is on: leave its `using` before anything else is put on, added or removed"
                )
            self._changing = True
            try:
                yield
            finally:
                self._changing = False

    def _pair_ids(self, name: str, pairs: Sequence[str], wanted: str | Sequence[str] | None) -> torch.Tensor:
        """Scalar, or [B]."""
        rows = [wanted] if wanted is None or isinstance(wanted, str) else wanted
        if unknown := [row for row in rows if row not in (*pairs, NONE)]:
            raise ArtefactError(
                f"delta {name!r} has pairs {', '.join(pairs)}, not {unknown[0]}: pass pair=..., or {NONE!r} in another "
                "direction"
            )
        known = [pair_id(row, pairs) for row in rows if row is not None]
        ids = torch.tensor(known, device=self.model.device)
        return ids[0] if isinstance(wanted, str) else ids

    def _put(self, added: _Added) -> None:
        for index, layer in added.layers.items():
            self._layers[index] = layer
        for name, values in added.tensors.items():
            parameter = self.model.get_parameter(name)
            self._base_tensors[name] = parameter.data
            parameter.data = values

    def _put_base(self, added: _Added) -> None:
        for index in added.layers:
            self._layers[index] = self._base_layers[index]
        while self._base_tensors:
            name, values = self._base_tensors.popitem()
            self.model.get_parameter(name).data = values

    def _changed(self, delta: Delta) -> dict[str, torch.Tensor]:
        """Changed values of the model's parameters, in their type and on their device."""
        source, changed = Flipped(self._weights, delta), {}
        for name, parameter in self.model.named_parameters():
            stored = self._weights.stored_name(name, self.model.base_model_prefix, self._family.renamed)
            if stored is not None and not source.changed().isdisjoint(self._weights.names_of(stored)):
                changed[name] = whole(source, stored, parameter.dtype).to(parameter.device)
        return changed

    def _routed(self, delta: Delta, trained: TrainedModel) -> _Added:
        """Copies of the selected layers that share all but their FFNs with the base's."""
        routing, selection = delta.routing(), delta.selection()
        assert routing is not None
        try:
            for chosen in selection.layers:
                self._layers[chosen.layer] = _shared(self._base_layers[chosen.layer])
            # Its loop touches the selected layers alone.
            install(self.model, self._family, selection, routing, seed=0)
            for prefix, ffn in routed_ffns(self.model):
                for local, parameter in ffn.named_parameters():
                    name = f"{prefix}.{local}"
                    values = trained.value(name, parameter, parameter.dtype)
                    parameter.requires_grad_(False).data = values.to(parameter.device)
            layers = {chosen.layer: self._layers[chosen.layer].eval() for chosen in selection.layers}
            return _Added(layers, selection.pairs, {})
        finally:
            for index, layer in enumerate(self._base_layers):
                self._layers[index] = layer


def _shared(layer: nn.Module) -> nn.Module:
    """Another layer object with the very parameters, buffers and configuration of `layer`."""
    kept: list[object] = [*layer.parameters(), *layer.buffers()]
    kept += [module.config for module in layer.modules() if hasattr(module, "config")]
    return copy.deepcopy(layer, {id(part): part for part in kept})
