"""A trained model as tensors: what training changed, and where it belongs in the base. Needs no DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from lander_ds.checkpoint.checkpoint import Checkpoint
from lander_ds.common.errors import ModelError
from lander_ds.config.schema.method import RoutingConfig
from lander_ds.distributed.start import Start
from lander_ds.export.pieces import Share, shares, whole
from lander_ds.export.sources import Change, Merged, TensorSource, rounded
from lander_ds.inference.open import restore_shape
from lander_ds.method.selection import Selection
from lander_ds.models.family import Family
from lander_ds.models.loading import build, tied_parameters
from lander_ds.models.surgery import Slice, slices
from lander_ds.models.weights import BaseWeights, Piece


@dataclass(frozen=True)
class TrainedModel:
    """The shape a model was trained in (on meta), and its tensors."""

    model: PreTrainedModel
    family: Family
    source: TensorSource
    """Everything but the gates, in the base's layout."""
    gates: Mapping[str, torch.Tensor]
    """Parameter name -> values, in the type of the training."""
    method: str
    """train.method."""
    routing: RoutingConfig
    """Options of the gates."""
    selection: Selection | None
    """Layers and banks, of methods that have them."""
    base_fingerprint: str

    @staticmethod
    def open(start: Start, checkpoint: Checkpoint) -> TrainedModel:
        """Read a checkpoint and rebuild the shape it was trained in."""
        config = start.recipe.model
        model, family = build(config, attention=None)
        restore_shape(model, family, start, checkpoint)
        weights = BaseWeights(config.path, config.allow_pickle)
        tensors = checkpoint.result()
        state = checkpoint.state
        changes = _Changes(model, family, weights, tensors, state["lora"]).by_tensor()
        gates = {name: rounded(name, tensors[name], model.dtype) for name in tensors if is_gate(name)}
        return TrainedModel(
            model,
            family,
            Merged(weights, changes),
            gates,
            state["method"],
            RoutingConfig(**state["routing"]),
            checkpoint.selection(),
            start.base_fingerprint,
        )

    @property
    def weights(self) -> BaseWeights:
        """The base."""
        return self.source.weights

    @property
    def pairs_differ(self) -> bool:
        """Whether it computes something else for every pair, which no standard architecture does."""
        return self.method == "lander" and (self.routing.gate != "none" or self.routing.other_pairs == "mask")

    def stored_name(self, name: str) -> str:
        """Name on disk of the base tensor `name`.

        Raises:
            ModelError: the base lacks it.
        """
        stored = self.weights.stored_name(name, self.model.base_model_prefix, self.family.renamed)
        if stored is None:
            raise ModelError(
                f"{self.weights.directory} lacks the tensor {name}: copy the model directory again"
            )
        return stored

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Parameters of the trained shape, tied ones once."""
        tied = tied_parameters(self.model)
        return ((name, p) for name, p in self.model.named_parameters() if name not in tied)

    def value(self, name: str, parameter: torch.nn.Parameter, dtype: torch.dtype | None) -> torch.Tensor:
        """A parameter of the trained shape in `dtype` (None: that of the base tensor it comes from, for gates that of
        the training)."""
        if is_gate(name):
            return rounded(name, self.gates[name], dtype or parameter.dtype)
        cut: Slice | None = getattr(parameter, "lander_slice", None)
        if cut is None:
            return whole(self.source, self.stored_name(name), dtype)
        return cut.take(whole(self.source, self.stored_name(cut.tensor), dtype))


def is_gate(name: str) -> bool:
    """Whether a parameter belongs to a gate."""
    return ".router." in name


@dataclass(frozen=True)
class _Changes:
    """From the trained tensors of a checkpoint to changes of base tensors."""

    model: PreTrainedModel
    family: Family
    weights: BaseWeights
    tensors: Mapping[str, torch.Tensor]
    """Parameter name -> float32 values."""
    lora: Mapping[str, Any]

    def by_tensor(self) -> dict[str, list[Change]]:
        """Name on disk -> what happens to it."""
        cuts = slices(self.model)
        copies: dict[str, list[str]] = {}
        for tied, original in tied_parameters(self.model).items():
            copies.setdefault(original, []).append(tied)
        changes: dict[str, list[Change]] = {}
        for name in self.tensors:
            if name in cuts:
                stored = self._stored(cuts[name].tensor)
                for share in shares(cuts[name], stored, self.weights.pieces(stored)):
                    changes.setdefault(share.stored, []).append(partial(self._put, name, share))
            elif ".lora_A." in name:
                adapted = name.split(".lora_A.", maxsplit=1)[0] + ".weight"
                changes.setdefault(self._stored(adapted), []).append(partial(self._adapt, name))
            elif ".lora_B." not in name and not is_gate(name):
                # Some files hold tied tensors twice; unequal ones would no longer be tied on loading.
                for stored in {self._stored(name), *filter(None, map(self._find, copies.get(name, [])))}:
                    pieces = self.weights.pieces(stored)
                    for piece in pieces:
                        changes.setdefault(piece.name, []).append(partial(self._replace, name, piece))
                    if not pieces:
                        changes.setdefault(stored, []).append(partial(self._replace, name, None))
        return changes

    def _find(self, name: str) -> str | None:
        return self.weights.stored_name(name, self.model.base_model_prefix, self.family.renamed)

    def _stored(self, name: str) -> str:
        stored = self._find(name)
        assert stored is not None, f"the base lacks {name}, with which training began"
        return stored

    def _put(self, name: str, share: Share, values: torch.Tensor) -> torch.Tensor:
        return share.cut.put(values, share.of(self.tensors[name]).to(values.dtype))

    def _adapt(self, name: str, values: torch.Tensor) -> torch.Tensor:
        update = self.tensors[name.replace(".lora_A.", ".lora_B.")] @ self.tensors[name]
        return values.add_(update, alpha=self.lora["alpha"] / self.lora["r"])

    def _replace(self, name: str, piece: Piece | None, values: torch.Tensor) -> torch.Tensor:
        trained = self.tensors[name]
        return (trained if piece is None else piece.of(trained)).to(values.dtype)
