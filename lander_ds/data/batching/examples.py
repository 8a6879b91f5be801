"""From the plan to token ids: the examples of one micro-batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from lander_ds.data.batching.packing import Example
from lander_ds.data.batching.plan import GlobalBatch
from lander_ds.data.prepared import PreparedSplit


def examples(
    batch: GlobalBatch,
    positions: Iterable[int],
    splits: Sequence[PreparedSplit] | Mapping[int, PreparedSplit],
) -> list[Example]:
    """The examples at `positions` of a global batch, in that order.

    Args:
        batch: from `BatchPlan.batch`.
        positions: one part of `cut`.
        splits: the split of every pair in the batch, by pair id; a mapping where -1 is among them.
    """
    examples = []
    for position in positions:
        pair_id = int(batch.pair_ids[position])
        input_ids, prompt_length = splits[pair_id].tokens(int(batch.indices[position]))
        examples.append(Example(input_ids, prompt_length, pair_id, int(batch.sample_ids[position])))
    return examples
