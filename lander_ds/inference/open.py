"""Models that translate: the untouched base, or the base with a checkpoint's trained tensors in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from lander_ds.checkpoint import checkpoint
from lander_ds.checkpoint.checkpoint import Checkpoint
from lander_ds.common.errors import ArtefactError
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.deepspeed_json import resolve_inference_config
from lander_ds.config.recipe import LoraConfig, Recipe, RoutingConfig
from lander_ds.distributed import process_group
from lander_ds.distributed.engines.zero3 import Zero3
from lander_ds.models.family import Family
from lander_ds.models.loading import build, fill
from lander_ds.models.parameter_groups import prepare_model
from lander_ds.models.routed_ffn import Routing, routed
from lander_ds.models.surgery import routed_ffns
from lander_ds.models.weights import BaseWeights, base_fingerprint


class InferenceModel:
    """An HF model in evaluation mode whose routing, if it has one, is told the language pair."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Wrap `model`."""
        self.model = model
        self._pairs = next((ffn.pairs for _, ffn in routed_ffns(model)), ())

    @contextmanager
    def pair(self, pair: str) -> Iterator[None]:
        """Within this context, in this thread, every token belongs to `pair`."""
        if not self._pairs:
            yield
            return
        with routed(Routing(torch.tensor(self._pairs.index(pair), device=process_group.device()))):
            yield


def open_for_inference(
    recipe: Recipe, run: RunDirectory, system: Literal["base", "trained"]
) -> InferenceModel:
    """The model of a system, on this rank's device or sharded over the ranks (`translate.weights`).

    Raises:
        ArtefactError: there is no checkpoint, or it belongs to another base model.
    """
    model, family = build(recipe.model, attention=None)
    trained: Mapping[str, torch.Tensor] = {}
    if system == "trained":
        newest = checkpoint.newest(run.checkpoints)
        restore_shape(model, family, recipe, newest)
        trained = newest.trained()
    weights = BaseWeights(recipe.model.path, recipe.model.allow_pickle)
    if recipe.translate.weights == "sharded":
        engine = Zero3(resolve_inference_config(recipe, process_group.world_size()))
        fill(model, family, weights, engine.placement, trained, reads=engine.reads_weights)
        model = engine.shard(model).module
    else:
        fill(model, family, weights, _to_device, trained)
        model.to(process_group.device())
    model.eval()
    # With a head that requires no gradient, torch multiplies the last hidden state of a prompt by a copy of the head
    # per sentence (gigabytes) instead of by the head.
    model.requires_grad_(True)
    return InferenceModel(model)


def restore_shape(model: PreTrainedModel, family: Family, recipe: Recipe, trained: Checkpoint) -> None:
    """Bring a base model (on meta) into the shape it was trained in.

    Raises:
        ArtefactError: the checkpoint belongs to another base model, or is damaged.
    """
    fingerprint = base_fingerprint(recipe.model.path)
    if trained.state["base_fingerprint"] != fingerprint:
        raise ArtefactError(
            f"{trained.path} was trained from another base model ({trained.state['base_fingerprint']}) than "
            f"{recipe.model.path} ({fingerprint}): correct model.path, or train again"
        )
    method: Any = trained.state["method"]
    as_trained = replace(
        recipe,
        train=replace(recipe.train, method=method, lora=LoraConfig(**trained.state["lora"])),
        routing=RoutingConfig(**trained.state["routing"]),
    )
    prepare_model(model, family, as_trained, trained.selection())


def _to_device(unit: nn.Module) -> None:
    unit.to(process_group.device())
