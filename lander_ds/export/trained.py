"""A trained model as tensors: what training changed, and where it belongs in the base. Needs no DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from lander_ds.checkpoint.checkpoint import Checkpoint
from lander_ds.config.recipe import Recipe
from lander_ds.families.family import Family
from lander_ds.families.loading import build, tied_parameters
from lander_ds.families.weights import BaseWeights
from lander_ds.routing.surgery import Slice, slices
from lander_ds.training.inference import restore_shape


@dataclass(frozen=True)
class TrainedModel:
    """The base on disk, the shape it was trained in (on meta), and the trained tensors."""

    weights: BaseWeights
    model: PreTrainedModel
    family: Family
    checkpoint: Checkpoint
    tensors: Mapping[str, torch.Tensor]
    """Parameter name -> float32 values."""
    cuts: Mapping[str, Slice]
    """Parameter name -> where its values stand in the base, for everything surgery has cut."""

    @staticmethod
    def open(recipe: Recipe, checkpoint: Checkpoint) -> TrainedModel:
        """Read a checkpoint and rebuild the shape it was trained in."""
        model, family = build(recipe.model, attention=None)
        restore_shape(model, family, recipe, checkpoint)
        return TrainedModel(
            BaseWeights(recipe.model.path), model, family, checkpoint, checkpoint.trained(), slices(model)
        )

    def stored_name(self, name: str) -> str:
        """Name on disk of the base tensor `name`."""
        stored = self._find(name)
        assert stored is not None, f"the base lacks {name}, with which training began"
        return stored

    def _find(self, name: str) -> str | None:
        return self.weights.stored_name(name, self.model.base_model_prefix, self.family.renamed)

    def changes(self) -> dict[str, list[str]]:
        """Base tensors that training changed: name on disk -> names of the trained tensors that go into it."""
        copies: dict[str, list[str]] = {}
        for tied, original in tied_parameters(self.model).items():
            copies.setdefault(original, []).append(tied)
        found: dict[str, list[str]] = {}
        for name in self.tensors:
            if name in self.cuts:
                found.setdefault(self.stored_name(self.cuts[name].tensor), []).append(name)
            elif ".lora_A." in name:
                found.setdefault(self.stored_name(_adapted(name)), []).append(name)
            elif ".lora_B." not in name and ".router." not in name:
                # Some files hold tied tensors twice; unequal ones would no longer be tied on loading.
                stored = {self.stored_name(name), *filter(None, map(self._find, copies.get(name, [])))}
                for place in stored:
                    found.setdefault(place, []).append(name)
        return found

    def merged(self, stored: str, names: list[str], dtype: torch.dtype | None) -> torch.Tensor:
        """The base tensor `stored` with the trained tensors `names` written into it, in `dtype` (None: its own)."""
        base = self.weights.read(stored)
        kind = base.dtype if dtype is None or not base.is_floating_point() else dtype
        merged = base.to(kind)
        for name in names:
            values = self.tensors[name]
            if name in self.cuts:
                cut = self.cuts[name]
                merged.index_copy_(cut.dim, cut.neurons, values.to(kind))
            elif ".lora_A." in name:
                lora = self.checkpoint.state["lora"]
                update = self.tensors[name.replace(".lora_A.", ".lora_B.")] @ values
                merged = (base.float() + update * (lora["alpha"] / lora["r"])).to(kind)
            else:
                merged = values.to(kind, copy=True)
        return merged


def _adapted(name: str) -> str:
    """Name of the weight that an adapter matrix changes."""
    return name.split(".lora_A.", maxsplit=1)[0] + ".weight"
