"""This rank's packed micro-batches of a set of examples, the same number on every rank.

A micro-batch that gets no example (fewer examples than micro-batches) is filled with one token that belongs to no
pair and no sample (both ids are -1) and has no target, because every rank must call the same modules equally often. Such
tokens also end a row, so that rows have few different lengths (`rounded_up`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.nn import functional

from lander_ds.common.sizes import rounded_up
from lander_ds.config.schema.training import TrainConfig
from lander_ds.data.batching.examples import examples
from lander_ds.data.batching.packing import Example, PackedBatch, pack
from lander_ds.data.batching.plan import GlobalBatch, cut
from lander_ds.data.prefixes import Prefixes
from lander_ds.data.prepared import PreparedSplit


def filler(tokens: int) -> Example:
    """An example that counts for nothing."""
    return Example(np.zeros(tokens, dtype=np.int32), prompt_length=tokens, pair_id=-1, sample_id=-1)


FILLER = filler(1)


def row_lengths(split: PreparedSplit, preferences: bool) -> np.ndarray:
    """[n] int32: tokens that each example brings into a row, with its worse translation if `preferences`."""
    return split.lengths + split.rejected_lengths if preferences else split.lengths


def preferences_in(batch: GlobalBatch, splits: Mapping[int, PreparedSplit]) -> int:
    """Examples of a global batch that have a worse translation."""
    return sum(
        int((split.rejected_lengths[batch.indices[batch.pair_ids == pair]] > 0).sum())
        for pair, split in splits.items()
    )


def whole_split(
    splits: Mapping[int, PreparedSplit], limit: int | None, preferences: bool = False
) -> GlobalBatch:
    """The first `limit` examples of every pair as one global batch, in the order of the pairs.

    Args:
        splits: prepared data by pair id; pairs may be missing.
        limit: None takes all.
        preferences: count worse translations as tokens too.
    """
    counts = {pair: len(split) if limit is None else min(limit, len(split)) for pair, split in splits.items()}
    targets = np.zeros(max(splits) + 1, dtype=np.int64)
    for pair, split in splits.items():
        targets[pair] = split.target_lengths[: counts[pair]].sum()
    return GlobalBatch(
        step=0,
        pair_ids=np.repeat(np.array(list(counts), dtype=np.int32), list(counts.values())),
        indices=np.concatenate([np.arange(count, dtype=np.int64) for count in counts.values()]),
        sample_ids=np.arange(sum(counts.values()), dtype=np.int64),
        lengths=np.concatenate(
            [row_lengths(split, preferences)[: counts[pair]] for pair, split in splits.items()]
        ),
        target_tokens=int(targets.sum()),
        target_tokens_per_pair=targets,
    )


def micro_batch_tokens(train: TrainConfig) -> int:
    """Token capacity of one micro-batch on one rank."""
    return train.micro_batch * train.pack_tokens


def micro_batches_for(tokens: int, capacity: int, ranks: int) -> int:
    """Micro-batches per rank into which `tokens` fit when each holds about `capacity`; at least 1."""
    return max(1, math.ceil(tokens / (ranks * capacity)))


def packed(
    batch: GlobalBatch,
    splits: Sequence[PreparedSplit] | Mapping[int, PreparedSplit],
    rank: int,
    ranks: int,
    micro_batches: int,
    device: torch.device,
    prefixes: Prefixes | None = None,
    preferences: bool = False,
) -> Iterator[PackedBatch]:
    """This rank's micro-batches of `batch`, on `device`.

    Args:
        batch: the global batch.
        splits: prepared data by pair id; -1 for texts without a pair.
        rank, ranks: which share.
        micro_batches: how many per rank.
        device: where they go.
        prefixes: hidden states of all examples of `splits`, to go with them.
        preferences: put the worse translation of an example behind it.
    """
    for positions in cut(batch, ranks, micro_batches)[rank]:
        chosen = examples(batch, positions, splits, preferences) or [FILLER]
        tokens = sum(len(example.input_ids) for example in chosen)
        missing = rounded_up(tokens) - tokens
        row = pack([*chosen, filler(missing)] if missing else chosen)
        if prefixes is not None:
            prefix = functional.pad(prefixes.of(batch, positions), (0, 0, 0, missing))
            row = replace(row, prefix=prefix, prefix_layers=prefixes.layer)
        yield row.to(device)
