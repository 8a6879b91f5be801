"""What tests of exports share: exporting a made-up checkpoint, and looking at what was written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lander_ds.checkpoint import checkpoint
from lander_ds.checkpoint.retention import Retention
from lander_ds.checkpoint.writer import Parts, Writer
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.recipe import Recipe
from lander_ds.distributed.start import Start
from lander_ds.export.dense import export_dense
from lander_ds.export.trained import TrainedModel
from lander_ds.export.writer import Form
from lander_ds.inference.open import open_for_inference
from lander_ds.models.weights import BaseWeights
from support.checkpoints import selection_for, shape, write_checkpoint
from support.tiny_models import examples


def start_of(recipe: Recipe) -> Start:
    """Of a process that works with a recipe, in the recipe's run directory."""
    return Start(recipe, RunDirectory(recipe.run_dir))


def open_trained(recipe: Recipe) -> TrainedModel:
    """The newest checkpoint of the recipe's run."""
    start = start_of(recipe)
    return TrainedModel.open(start, checkpoint.newest(start.run.checkpoints))


def dense(recipe: Recipe, dtype: torch.dtype | None = None, shard_bytes: int | None = None) -> Path:
    """Export the newest checkpoint and return the directory."""
    run = RunDirectory(recipe.run_dir)
    export_dense(open_trained(recipe).source, run.export, Form(dtype, shard_bytes))
    return run.export


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model directory."""
    weights = BaseWeights(directory, allow_pickle=True)
    return {name: weights.read(name) for name in weights.names()}


def contents(directory: Path) -> dict[str, bytes]:
    """File -> bytes, of everything below a directory."""
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()
    }


def logits(model: Any, pair: str | None = None) -> list[torch.Tensor]:
    """Logits of the example sequences, float32."""
    arguments = {} if pair is None else {"pair": pair}
    with torch.no_grad():
        return [model(ids[None], **arguments).logits.float() for ids in examples()]


def trained_logits(recipe: Recipe, pair: str) -> list[torch.Tensor]:
    """Logits of the newest checkpoint for a pair, as this package computes them."""
    ours = open_for_inference(start_of(recipe), "trained")
    ours.model.float()
    with ours.pair(pair):
        return logits(ours.model)


def untrained_checkpoint(recipe: Recipe) -> None:
    """A checkpoint in which no bank or tensor has moved, and gates are new."""
    selection = selection_for(recipe)
    model, _ = shape(recipe, selection)
    values = {name: p.detach().float().clone() for name, p in model.named_parameters() if p.requires_grad}
    rewrite_checkpoint(recipe, lambda tensors: tensors.update(values))


def rewrite_checkpoint(recipe: Recipe, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Write a made-up checkpoint, and a newer one with changed tensors."""
    write_checkpoint(recipe)
    rewrite(RunDirectory(recipe.run_dir), change)


def rewrite(
    run: RunDirectory,
    change: Callable[[dict[str, torch.Tensor]], Any],
    routing: Mapping[str, Any] | None = None,
    averaged: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write a newer checkpoint with changed tensors, options of the gates, and averages."""
    actual = checkpoint.newest(run.checkpoints)
    tensors = {name: tensor.clone() for name, tensor in actual.trained().items()}
    change(tensors)
    writer = Writer(run.checkpoints, Retention(), background=False)
    # The writer adds these by itself.
    own = ("format", "step", "files", "versions")
    description = {name: value for name, value in actual.state.items() if name not in own}
    description["routing"] = {**description["routing"], **(routing or {})}
    selection = run.selection if actual.selection() is not None else None
    writer.save(actual.step + 1, Parts(tensors, {}, averaged or {}), description, selection)
    writer.finish()
