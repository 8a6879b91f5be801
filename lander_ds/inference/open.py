"""Models that translate: the untouched base, or the base with a checkpoint's trained tensors in it."""

from __future__ import annotations

from collections.abc import Iterator
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
from lander_ds.distributed.engines import zero3
from lander_ds.models.family import Family
from lander_ds.models.loading import build, fill
from lander_ds.models.parameter_groups import prepare_model
from lander_ds.models.routed_ffn import RoutingState
from lander_ds.models.weights import BaseWeights, base_fingerprint


class InferenceModel:
    """An HF model in evaluation mode whose routing, if it has one, is told the language pair."""

    def __init__(self, model: PreTrainedModel, state: RoutingState | None) -> None:
        """Wrap `model`; `state` is None for models without routing."""
        self.model = model
        self._state = state

    @contextmanager
    def pair(self, pair: str) -> Iterator[None]:
        """Within this context every token belongs to `pair`."""
        if self._state is None:
            yield
            return
        self._state.begin(torch.tensor(self._state.pairs.index(pair), device=process_group.device()))
        try:
            yield
        finally:
            self._state.pair_ids = None


def open_for_inference(
    recipe: Recipe, run: RunDirectory, system: Literal["base", "trained"]
) -> InferenceModel:
    """The model of a system, on this rank's device or sharded over the ranks (`translate.weights`).

    Raises:
        ArtefactError: there is no checkpoint, or it belongs to another base model.
    """
    found = checkpoint.newest(run.checkpoints) if system == "trained" else None
    model, family = build(recipe.model, attention=None)
    state = None if found is None else restore_shape(model, family, recipe, found)
    weights = BaseWeights(recipe.model.path, recipe.model.allow_pickle)
    trained = {} if found is None else found.trained()
    if recipe.translate.weights == "sharded":
        config = resolve_inference_config(recipe, process_group.world_size())
        fill(model, family, weights, zero3.partitioner(config), trained, reads=process_group.rank() == 0)
        model = zero3.initialise(model, config, None).module
    else:
        fill(model, family, weights, _to_device, trained)
        model.to(process_group.device())
    model.eval()
    # With a head that requires no gradient, torch multiplies the last hidden state of a prompt by a copy of the head
    # per sentence (gigabytes) instead of by the head.
    model.requires_grad_(True)
    return InferenceModel(model, state)


def restore_shape(
    model: PreTrainedModel, family: Family, recipe: Recipe, found: Checkpoint
) -> RoutingState | None:
    """Bring a base model (on meta) into the shape it was trained in; returns its routing state, if any.

    Raises:
        ArtefactError: the checkpoint belongs to another base model, or is damaged.
    """
    fingerprint = base_fingerprint(recipe.model.path)
    if found.state["base_fingerprint"] != fingerprint:
        raise ArtefactError(
            f"{found.path} was trained from another base model ({found.state['base_fingerprint']}) than "
            f"{recipe.model.path} ({fingerprint}): correct model.path, or train again"
        )
    method: Any = found.state["method"]
    as_trained = replace(
        recipe,
        train=replace(recipe.train, method=method, lora=LoraConfig(**found.state["lora"])),
        routing=RoutingConfig(**found.state["routing"]),
    )
    return prepare_model(model, family, as_trained, found.selection())


def _to_device(unit: nn.Module) -> None:
    unit.to(process_group.device())
