"""From the plan to token ids: the examples of one micro-batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from lander_ds.data.batching.packing import Example
from lander_ds.data.batching.plan import GlobalBatch
from lander_ds.data.prepared import PreparedSplit


def examples(
    batch: GlobalBatch,
    positions: Iterable[int],
    splits: Sequence[PreparedSplit] | Mapping[int, PreparedSplit],
    preferences: bool = False,
) -> list[Example]:
    """The examples at `positions` of a global batch, in that order.

    Args:
        batch: from `BatchPlan.batch`.
        positions: one part of `cut`.
        splits: the split of every pair in the batch, by pair id; a mapping where -1 is among them.
        preferences: put the worse translation of an example behind it, and examples that have none behind all others.
    """
    alone, preferred = [], []
    for position in positions:
        pair_id, index = int(batch.pair_ids[position]), int(batch.indices[position])
        input_ids, prompt_length = splits[pair_id].tokens(index)
        example = Example(input_ids, prompt_length, pair_id, int(batch.sample_ids[position]))
        worse = splits[pair_id].rejected(index) if preferences else None
        if worse is None:
            alone.append(example)
        else:
            preferred += [example, replace(example, input_ids=worse, rejected=True)]
    return preferred + alone
