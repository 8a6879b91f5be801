"""The global batch plan: which examples make up the batch of a step, before it is cut over ranks.

The plan is a pure function of (seed, step, lengths): any order of calls, any number of ranks and
micro-batches, and a resumed run see the same batches. It holds lengths, never text.

Shapes: M pairs, E examples of a global batch.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lander_ds.common.errors import ConfigError, DataError

DRAWS_PER_BLOCK = 1 << 14
BLOCKS_KEPT = 8

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class GlobalBatch:
    """The examples of one optimizer step, over all ranks and micro-batches."""

    step: int
    """Step number from 0."""
    pair_ids: np.ndarray
    """[E] int32: position of the pair in the recipe; -1 for a text without one (`data.replay`)."""
    indices: np.ndarray
    """[E] int64: position in that pair's training split, or among those texts."""
    sample_ids: np.ndarray
    """[E] int64: number of the draw, unique over the run. Keys the gate noise."""
    lengths: np.ndarray
    """[E] int32: tokens of each example."""
    target_tokens: int
    """Target tokens of the whole batch: what the loss is divided by."""
    target_tokens_per_pair: np.ndarray
    """[M] int64: target tokens of each pair."""

    def __len__(self) -> int:
        return len(self.pair_ids)


@dataclass(frozen=True)
class _Draws:
    """A block of consecutive draws, [DRAWS_PER_BLOCK] each."""

    pair_ids: np.ndarray
    indices: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True)
class Replay:
    """Texts without a pair."""

    lengths: np.ndarray
    """[size] tokens of each."""
    target_lengths: np.ndarray
    """[size] target tokens of each."""
    share: float
    """Of the tokens of a global batch, on average; more than 0, less than 1."""


class BatchPlan:
    """Draws examples with temperature sampling over pairs and fills global batches up to a token budget.

    Draw d takes a pair with probability proportional to size ** (1 / temperature), then the next example of
    that pair's shuffled order; a pair that is through is shuffled anew. An example that no longer fits
    opens the next batch, so nothing is skipped. Texts without a pair are drawn as often as gives them their share of the
    tokens.

    Args:
        lengths: per pair, [size] tokens of each example.
        target_lengths: per pair, [size] target tokens of each example.
        batch_tokens: token budget of a global batch.
        temperature: 1 samples in proportion to size, larger values more evenly, infinity evenly.
        seed: decides everything random.
        replay: what there is besides pairs; default: nothing.

    Raises:
        ConfigError: the temperature is not positive.
        DataError: a pair has no example, or one longer than the budget.
    """

    def __init__(
        self,
        lengths: Sequence[np.ndarray],
        target_lengths: Sequence[np.ndarray],
        *,
        batch_tokens: int,
        temperature: float,
        seed: int,
        replay: Replay | None = None,
    ) -> None:
        if not temperature > 0:
            raise ConfigError(
                f"train.temperature: {temperature} is not positive: 1 samples pairs in proportion to size"
            )
        if not lengths:
            raise DataError("there is no training data: give data.corpora with split: train")
        for number, sizes in enumerate(lengths):
            if len(sizes) == 0:
                raise DataError(
                    f"pair number {number} of data.pairs has no training example: add a corpus for it"
                )
            _check_fit(sizes, f"pair number {number} of data.pairs", batch_tokens)
        self._lengths, self._target_lengths = list(lengths), list(target_lengths)
        self._batch_tokens, self._seed = batch_tokens, seed
        weights = np.array([len(sizes) for sizes in lengths], dtype=np.float64) ** (1.0 / temperature)
        weights /= weights.sum()
        self._pairs = len(lengths)
        if replay is not None:
            # Behind the pairs, under the next number.
            _check_fit(replay.lengths, "data.replay", batch_tokens)
            self._lengths.append(replay.lengths)
            self._target_lengths.append(replay.target_lengths)
            drawn_tokens = float(weights @ [sizes.mean() for sizes in lengths])
            odds = replay.share / (1.0 - replay.share) * drawn_tokens / float(replay.lengths.mean())
            weights = np.append(weights, odds) / (1.0 + odds)
        self._cumulative = np.cumsum(weights)[:-1]
        self._starts: list[int] = [0]  # the first draw of each step
        self._open_tokens = 0  # in the step that is not yet full
        # Per block: how often each pair was drawn before it. Enough to make any block again.
        self._drawn_before: list[np.ndarray] = [np.zeros(len(self._lengths), dtype=np.int64)]
        self._blocks: OrderedDict[int, _Draws] = OrderedDict()
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def batch(self, step: int) -> GlobalBatch:
        """The global batch of a step, counted from 0."""
        while len(self._starts) < step + 2:
            self._plan_next_block()
        first, end = self._starts[step], self._starts[step + 1]
        blocks = range(first // DRAWS_PER_BLOCK, (end - 1) // DRAWS_PER_BLOCK + 1)
        draws = [self._block(number) for number in blocks]
        window = slice(first - blocks[0] * DRAWS_PER_BLOCK, end - blocks[0] * DRAWS_PER_BLOCK)
        pair_ids = np.concatenate([d.pair_ids for d in draws])[window]
        indices = np.concatenate([d.indices for d in draws])[window]
        targets = np.zeros(len(self._lengths), dtype=np.int64)
        for pair, sizes in enumerate(self._target_lengths):
            targets[pair] = sizes[indices[pair_ids == pair]].sum(dtype=np.int64)
        pair_ids = np.where(pair_ids < self._pairs, pair_ids, np.int32(-1))
        return GlobalBatch(
            step=step,
            pair_ids=pair_ids,
            indices=indices,
            sample_ids=np.arange(first, end, dtype=np.int64),
            lengths=np.concatenate([d.lengths for d in draws])[window],
            target_tokens=int(targets.sum()),
            target_tokens_per_pair=targets[: self._pairs],
        )

    def _plan_next_block(self) -> None:
        """Find where steps begin among the next block of draws."""
        number = len(self._drawn_before) - 1
        draws = self._block(number)
        ends = np.cumsum(draws.lengths, dtype=np.int64)  # tokens up to and with each draw
        step_begin = -self._open_tokens
        while (fitting := int(np.searchsorted(ends, step_begin + self._batch_tokens, side="right"))) < len(
            ends
        ):
            self._starts.append(number * DRAWS_PER_BLOCK + fitting)
            step_begin = int(ends[fitting - 1]) if fitting else 0
        self._open_tokens = int(ends[-1]) - step_begin
        drawn = np.bincount(draws.pair_ids, minlength=len(self._lengths))
        self._drawn_before.append(self._drawn_before[number] + drawn)

    def _block(self, number: int) -> _Draws:
        if number not in self._blocks:
            self._blocks[number] = self._make_block(number)
            if len(self._blocks) > BLOCKS_KEPT:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(number)
        return self._blocks[number]

    def _make_block(self, number: int) -> _Draws:
        first = number * DRAWS_PER_BLOCK
        uniform = random_bits(DRAWS_PER_BLOCK, self._seed, 0, first=first) / 2.0**64
        pair_ids = np.searchsorted(self._cumulative, uniform, side="right").astype(np.int32)
        indices = np.empty(DRAWS_PER_BLOCK, dtype=np.int64)
        lengths = np.empty(DRAWS_PER_BLOCK, dtype=np.int32)
        for pair, sizes in enumerate(self._lengths):
            here = np.flatnonzero(pair_ids == pair)
            if len(here):
                occurrences = self._drawn_before[number][pair] + np.arange(len(here))
                indices[here] = self._in_shuffled_order(pair, occurrences)
                lengths[here] = sizes[indices[here]]
        return _Draws(pair_ids, indices, lengths)

    def _in_shuffled_order(self, pair: int, occurrences: np.ndarray) -> np.ndarray:
        """Examples of a pair at consecutive `occurrences`, each epoch being a permutation of its own."""
        size = len(self._lengths[pair])
        epochs, positions = np.divmod(occurrences, size)
        first, last = int(epochs[0]), int(epochs[-1])
        kept_first, kept = self._orders.get(pair, (0, np.empty((0, size), dtype=np.int32)))
        if first < kept_first or last >= kept_first + len(kept):
            # One row per epoch: a block takes a tiny pair through many epochs, a large one through one or two.
            keys = random_bits(size, self._seed, 1, pair, np.arange(first, last + 1, dtype=np.uint64))
            kept_first, kept = first, np.argsort(keys, axis=1, kind="stable").astype(np.int32)
            self._orders[pair] = (kept_first, kept)
        chosen: np.ndarray = kept[epochs - kept_first, positions]
        return chosen


def _check_fit(lengths: np.ndarray, what: str, batch_tokens: int) -> None:
    longest = int(np.argmax(lengths))
    if lengths[longest] > batch_tokens:
        raise DataError(
            f"training example {longest} of {what} has {lengths[longest]} tokens, more than a global batch: raise "
            f"train.batch_tokens ({batch_tokens}) or lower data.max_length"
        )


def random_bits(count: int, *key: int | np.ndarray, first: int = 0) -> np.ndarray:
    """[count] uint64 random bits, numbers `first`, `first` + 1, ... of the stream that `key` names.

    SplitMix64 (R, Steele, Lea and Flood 2014): the n-th number needs no other, and library versions change
    nothing. Where a part of the key is an array [R] uint64, R streams come back as [R, count].
    """
    with np.errstate(over="ignore"):
        state = np.zeros((), dtype=np.uint64)
        for part in key:
            state = _mix(
                state + _GOLDEN + (part if isinstance(part, np.ndarray) else np.uint64(part % 2**64))
            )
        counter = np.arange(first + 1, first + count + 1, dtype=np.uint64)
        return _mix(state[..., None] + _GOLDEN * counter)


def _mix(value: np.ndarray) -> np.ndarray:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = value ^ (value >> np.uint64(31))
    return mixed


def cut(batch: GlobalBatch, ranks: int, micro_batches: int) -> list[list[np.ndarray]]:
    """Divide a global batch over data-parallel ranks and micro-batches, with about equal tokens in each.

    Returns:
        [rank][micro_batch] positions [e] int64 into the batch's arrays, ascending. Every example stands in
        exactly one; a part is empty when there are fewer examples than parts.
    """
    parts: list[list[int]] = [[] for _ in range(ranks * micro_batches)]
    # Longest first into the emptiest part; neighbouring parts are of different ranks, so ranks fill evenly.
    loads = [(0, number) for number in range(len(parts))]
    for position in np.argsort(-batch.lengths.astype(np.int64), kind="stable"):
        load, number = loads[0]
        parts[number].append(int(position))
        heapq.heapreplace(loads, (load + int(batch.lengths[position]), number))
    arrays = [np.array(sorted(part), dtype=np.int64) for part in parts]
    return [arrays[rank::ranks] for rank in range(ranks)]
