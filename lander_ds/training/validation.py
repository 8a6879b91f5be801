"""Validation loss per pair: the same examples every time, without noise, gate as at inference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean

from lander_ds.data.batching.micro_batches import micro_batch_tokens, micro_batches_for, packed, whole_split
from lander_ds.data.prepared import PreparedSplit
from lander_ds.distributed import accelerator, collectives
from lander_ds.models.translation_model import BatchTotals
from lander_ds.training.session import Session


@dataclass(frozen=True)
class Validation:
    """What was measured on the validation data after a step."""

    losses: Mapping[str, float]
    """Mean loss per target token in nats, by pair."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Of the translations, by pair; empty where nothing is translated."""

    @property
    def mean_loss(self) -> float:
        """Over pairs."""
        return fmean(self.losses.values())

    @property
    def mean_score(self) -> float | None:
        """Over pairs; None where nothing is translated."""
        return fmean(self.scores.values()) if self.scores else None


def validation_loss(session: Session, splits: Mapping[int, PreparedSplit]) -> dict[str, float]:
    """Mean loss per target token in nats, by pair (collective).

    Args:
        session: the model.
        splits: validation data by pair id; pairs without any are left out of the result.
    """
    recipe, train = session.recipe, session.recipe.train
    batch = whole_split(splits, train.valid_examples)
    rank, ranks = session.dims.data_parallel_rank, session.dims.data_parallel_ranks
    count = micro_batches_for(int(batch.lengths.sum()), micro_batch_tokens(train), ranks)
    micro = packed(batch, splits, rank, ranks, count, accelerator.device())
    totals = BatchTotals(batch.target_tokens, len(batch.indices))
    losses, tokens = collectives.sum_over_ranks(
        session.engine.evaluate(list(micro), totals).per_pair
    ).tolist()
    return {recipe.data.pairs[i]: losses[i] / tokens[i] for i in splits}
