"""What a step works on: micro-batches of packed examples, in average sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lander_ds.config.recipe import Recipe
from lander_ds.data.batching.micro_batches import micro_batch_tokens
from lander_ds.training.session import micro_batches


@dataclass(frozen=True)
class Workload:
    """What the corpora are like (averages)."""

    example_tokens: int = 96
    """Tokens of an example, prompt and target together."""
    target_share: float = 0.5
    """Target tokens over all tokens."""


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch."""

    tokens: int
    """T."""
    targets: int
    """N, target tokens."""
    lengths: tuple[int, ...]
    """Tokens of each example; they sum to T."""


def micro_batch(recipe: Recipe, workload: Workload, data_ranks: int) -> tuple[MicroBatch, int]:
    """The micro-batch of a data-parallel rank, and how many a step has.

    The global batch is divided evenly, so a micro-batch holds batch_tokens / (ranks x number), at most its capacity.
    """
    count = micro_batches(recipe, data_ranks)
    tokens = min(
        micro_batch_tokens(recipe.train), math.ceil(recipe.train.batch_tokens / (data_ranks * count))
    )
    examples = max(1, round(tokens / workload.example_tokens))
    short, longer = divmod(tokens, examples)
    lengths = tuple(short + (number < longer) for number in range(examples))
    return MicroBatch(tokens, max(1, round(tokens * workload.target_share)), lengths), count
