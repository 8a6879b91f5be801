"""Checkpoints without a training: the shape of a trained model with changed values in its trained tensors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lander_ds.checkpoint.identity import identity_of
from lander_ds.checkpoint.retention import Retention
from lander_ds.checkpoint.writer import Parts, Writer
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.recipe import ModelConfig, Recipe
from lander_ds.config.schema.data import DataConfig
from lander_ds.config.schema.method import RoutingConfig
from lander_ds.config.schema.training import LoraConfig, ShiraConfig, TrainConfig
from lander_ds.method.selection import Selection
from lander_ds.models.family import Family
from lander_ds.models.loading import build, fill
from lander_ds.models.parameter_groups import mark_trained, prepare_model
from lander_ds.models.weights import BaseWeights, base_fingerprint
from support.selections import random_selection

PAIRS = ("en-de", "en-fr", "de-en")
LAYERS = (0, 2)


def recipe_for(
    base: Path, run: Path, method: str = "lander", gate: str = "input", dtype: str = "float32"
) -> Recipe:
    """A recipe of which export and inference read model, routing and training options."""
    return Recipe(
        run_dir=str(run),
        model=ModelConfig(str(base), dtype=dtype),  # type: ignore[arg-type]
        data=DataConfig(PAIRS, ()),
        deepspeed="unused",
        train=TrainConfig(method=method, lora=LoraConfig(r=3, alpha=4.0), shira=ShiraConfig(r=3)),  # type: ignore[arg-type]
        routing=RoutingConfig(gate=gate, hidden=8),  # type: ignore[arg-type]
    )


def shape(recipe: Recipe, selection: Selection) -> tuple[PreTrainedModel, Family]:
    """The model of the recipe's method, filled from its base, with `requires_grad` on what is trained."""
    model, family = build(recipe.model, attention=None)
    prepare_model(model, family, recipe, selection)
    fill(model, family, BaseWeights(recipe.model.path), lambda unit: None)
    mark_trained(model, family, recipe.train, selection)
    return model.eval(), family


def selection_for(recipe: Recipe) -> Selection:
    """Banks of every kind in `LAYERS`."""
    model, family = build(recipe.model, attention=None)
    built = random_selection(family.neurons(model), LAYERS, PAIRS, seed=4)
    return replace(built, metadata={"base_fingerprint": base_fingerprint(recipe.model.path)})


def write_checkpoint(recipe: Recipe, step: int = 7) -> dict[str, torch.Tensor]:
    """A checkpoint in the recipe's run directory whose trained tensors have all moved; returns these."""
    run, selection = RunDirectory(recipe.run_dir), selection_for(recipe)
    selection.save(run.selection)
    model, _ = shape(recipe, selection)
    generator = torch.Generator().manual_seed(9)
    tensors = {
        name: parameter.detach().float() + 0.1 * torch.randn(parameter.shape, generator=generator)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    writer = Writer(run.checkpoints, Retention(), background=False)
    writer.save(
        step,
        Parts(tensors, {}),
        identity_of(recipe, {"base": base_fingerprint(recipe.model.path), "data": "none"}),
        run.selection if recipe.train.method in ("lander", "layers") else None,
    )
    writer.finish()
    return tensors
