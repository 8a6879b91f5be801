"""Validation loss per pair: the same examples every time, without noise, gate as at inference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean

import torch

from lander_ds.data.batching.micro_batches import (
    micro_batch_tokens,
    micro_batches_for,
    packed,
    preferences_in,
    whole_split,
)
from lander_ds.data.prepared import PreparedSplit
from lander_ds.distributed import accelerator, collectives
from lander_ds.models.translation_model import BatchTotals
from lander_ds.training.session import Session


@dataclass(frozen=True)
class Preferences:
    """Means over the examples that have a better and a worse translation."""

    loss: float | None
    """In nats; None where it is not finite."""
    accuracy: float
    """How often the better translation is the likelier one."""
    margin: float | None
    """log p(better) - log p(worse) in nats; None where it is not finite."""

    @classmethod
    def of(cls, sums: torch.Tensor) -> Preferences | None:
        """From `Contrast.sums` [4, M + 1] of all ranks; None where there is no such example."""
        loss, wins, margin, count = sums.sum(1).tolist()
        return cls(finite(loss / count), wins / count, finite(margin / count)) if count else None


def finite(value: float) -> float | None:
    """`value`, or None (null in JSON) where it is not finite."""
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Validation:
    """What was measured on the validation data after a step."""

    losses: Mapping[str, float]
    """Of each pair: mean loss per target token in nats; with `train.objective: cpo` that times its weight, and the mean loss
    of preferences."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Of the translations, by pair; empty where nothing is translated."""
    preferences: Preferences | None = None
    """Of `train.objective: cpo`, where validation data have worse translations."""

    @property
    def mean_loss(self) -> float:
        """Over pairs."""
        return fmean(self.losses.values())

    @property
    def mean_score(self) -> float | None:
        """Over pairs; None where nothing is translated."""
        return fmean(self.scores.values()) if self.scores else None


def validation_loss(session: Session, splits: Mapping[int, PreparedSplit]) -> Validation:
    """Losses by pair, nothing translated (collective).

    Args:
        session: the model.
        splits: validation data by pair id; pairs without any are left out of the result.
    """
    recipe, train = session.recipe, session.recipe.train
    preference = session.model.objective.preference
    preferred = preference is not None
    batch = whole_split(splits, train.valid_examples, preferred)
    rank, ranks = session.dims.data_parallel_rank, session.dims.data_parallel_ranks
    count = micro_batches_for(int(batch.lengths.sum()), micro_batch_tokens(train), ranks)
    micro = packed(batch, splits, rank, ranks, count, accelerator.device(), preferences=preferred)
    preferences = preferences_in(batch, splits) if preferred else 0
    totals = BatchTotals(batch.target_tokens, len(batch.indices), preferences)
    sums = collectives.sum_over_ranks(session.engine.evaluate(list(micro), totals).per_pair).cpu()
    losses = sums[0] / sums[1]
    if preference is not None:
        losses = preference.likelihood * losses + sums[2] / sums[5].clamp(min=1.0)
    by_pair = {recipe.data.pairs[i]: float(losses[i]) for i in splits}
    return Validation(by_pair, preferences=Preferences.of(sums[2:]) if preferred else None)
