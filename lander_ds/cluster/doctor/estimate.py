"""What a run will need of disks and memory at least: weights, gradients, optimizer state, checkpoints, exports.

Activations and buffers come on top of the memory; `lander plan` counts those too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lander_ds.cluster.planning.anatomy import anatomy
from lander_ds.cluster.planning.memory import checkpoint_bytes, rank_memory
from lander_ds.cluster.planning.plan import sharding_of
from lander_ds.config.recipe import Recipe
from lander_ds.config.schema.training import TrainConfig
from lander_ds.training.session import micro_batches


@dataclass(frozen=True)
class Need:
    """Bytes."""

    device: int
    """On the GPU of the rank that holds most; on a machine without GPUs in the same memory as the rest."""
    host: int
    """In the host's memory for each rank, because the DeepSpeed JSON offloads it."""
    checkpoint: int
    """One checkpoint."""
    checkpoints: int
    """The most of them that lie on disk at one time."""
    exports: int
    """All exports."""
    estimated: bool
    """There is no selection yet; its size is taken from the recipe."""

    def as_json(self) -> dict[str, Any]:
        """For the way from a host."""
        return asdict(self)


def need_of(recipe: Recipe, ranks: Sequence[int]) -> Need:
    """Count on meta.

    Args:
        recipe: the run.
        ranks: of every host; together a multiple of the pipeline stages.

    Raises:
        ModelError, ArtefactError, ConfigError: model, selection or DeepSpeed JSON are unfit.
    """
    model, stages = anatomy(recipe), recipe.pipeline_stages
    data_ranks = max(1, sum(ranks) // stages)
    sharding = sharding_of(recipe, stages, ranks, micro_batches(recipe, data_ranks))
    parts = [
        rank_memory(model, span, sharding, targets=0, activations=0) for span in model.stage_spans(stages)
    ]
    tensors = model.tensors(model.whole)
    total, trained = (
        sum(tensor.elements for tensor in tensors if tensor.trained or not only) for only in (False, True)
    )
    return Need(
        device=max(p.weights + p.gradients + p.optimizer + p.persistent - p.on_host for p in parts),
        host=max(part.on_host for part in parts),
        checkpoint=checkpoint_bytes(model),
        checkpoints=checkpoints_at_once(recipe.train),
        exports=export_bytes(recipe, total, trained),
        estimated=model.estimated,
    )


def checkpoints_at_once(train: TrainConfig) -> int:
    """The most checkpoints that lie on disk at one time: those kept, and the one that is written before others go."""
    every = train.save_every or train.steps
    written = -(-train.steps // every)
    if train.keep_last == 0:
        return written
    spaced = train.steps // train.keep_every if train.keep_every else 0
    best = int(train.keep_best != "off" and train.valid_every > 0)
    return min(written, train.keep_last + spaced + best + 1)


def export_bytes(recipe: Recipe, total: int, trained: int) -> int:
    """All exports.

    Args:
        recipe: names them.
        total: parameters.
        trained: those of them that are trained.
    """
    export = recipe.export
    width = int(getattr(torch, recipe.model.dtype if export.dtype == "model" else export.dtype).itemsize)
    whole = sum(form in ("dense", "routed") for form in export.formats) + len(export.fold)
    return width * (whole * total + (trained if "delta" in export.formats else 0))
