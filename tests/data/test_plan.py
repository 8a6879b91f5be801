"""The global batch plan, its cut over ranks and micro-batches, and packing."""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lander_ds.common.errors import ConfigError, DataError
from lander_ds.data.batching.packing import Example, pack
from lander_ds.data.batching.plan import DRAWS_PER_BLOCK, BatchPlan, GlobalBatch, Replay, cut, random_bits


def make_plan(
    lengths: list[list[int]], batch_tokens: int, temperature: float = 1.0, seed: int = 1
) -> BatchPlan:
    sizes = [np.array(pair, dtype=np.int32) for pair in lengths]
    return BatchPlan(
        sizes, [pair // 2 for pair in sizes], batch_tokens=batch_tokens, temperature=temperature, seed=seed
    )


def same(a: GlobalBatch, b: GlobalBatch) -> bool:
    arrays = ("pair_ids", "indices", "sample_ids", "lengths", "target_tokens_per_pair")
    return (
        all(np.array_equal(getattr(a, n), getattr(b, n)) for n in arrays)
        and a.target_tokens == b.target_tokens
    )


corpora = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=12), min_size=1, max_size=4)


@settings(max_examples=40)
@given(corpora, st.integers(30, 200), st.sampled_from([1.0, 3.0, float("inf")]), st.integers(0, 2**32))
def test_plan_properties(lengths: list[list[int]], batch_tokens: int, temperature: float, seed: int) -> None:
    plan = make_plan(lengths, batch_tokens, temperature, seed)
    batches = [plan.batch(step) for step in range(25)]
    # Nothing is skipped, and no batch could have taken the next example.
    samples = np.concatenate([batch.sample_ids for batch in batches])
    assert np.array_equal(samples, np.arange(len(samples)))
    for batch, following in pairwise(batches):
        assert 0 < batch.lengths.sum() <= batch_tokens < batch.lengths.sum() + following.lengths[0]
    # Lengths and target counts are those of the examples.
    for batch in batches:
        expected = [lengths[p][i] for p, i in zip(batch.pair_ids, batch.indices, strict=True)]
        assert batch.lengths.tolist() == expected
        per_pair = [
            sum(length // 2 for length, p in zip(expected, batch.pair_ids, strict=True) if p == pair)
            for pair in range(len(lengths))
        ]
        assert batch.target_tokens_per_pair.tolist() == per_pair
        assert batch.target_tokens == sum(per_pair)
    # Every epoch of a pair shows every example once.
    pairs = np.concatenate([batch.pair_ids for batch in batches])
    indices = np.concatenate([batch.indices for batch in batches])
    for pair, sizes in enumerate(lengths):
        drawn = indices[pairs == pair]
        for epoch in range(len(drawn) // len(sizes)):
            assert sorted(drawn[epoch * len(sizes) : (epoch + 1) * len(sizes)]) == list(range(len(sizes)))


@settings(max_examples=20)
@given(corpora, st.permutations(range(12)), st.integers(0, 9))
def test_a_batch_does_not_depend_on_the_calls_before_it(
    lengths: list[list[int]], order: list[int], seed: int
) -> None:
    forwards = make_plan(lengths, 40, seed=seed)
    expected = [forwards.batch(step) for step in range(12)]
    shuffled = make_plan(lengths, 40, seed=seed)
    assert all(same(shuffled.batch(step), expected[step]) for step in order)


def test_batches_across_blocks_of_draws_and_back() -> None:
    generator = np.random.default_rng(0)
    lengths = [generator.integers(5, 50, size).tolist() for size in (40_000, 3)]
    forwards, jumping = make_plan(lengths, 2000, 2.0), make_plan(lengths, 2000, 2.0)
    batches = [forwards.batch(step) for step in range(9000)]
    samples = np.concatenate([batch.sample_ids for batch in batches])
    assert len(samples) > 8 * DRAWS_PER_BLOCK / 2
    assert np.array_equal(samples, np.arange(len(samples)))
    across = [
        b.step for b in batches if b.sample_ids[0] // DRAWS_PER_BLOCK != b.sample_ids[-1] // DRAWS_PER_BLOCK
    ]
    assert len(across) >= 3
    for step in [8999, *across, 0, 4321]:
        assert same(jumping.batch(step), batches[step])


def test_seed_changes_everything() -> None:
    lengths = [[10] * 100, [10] * 100]
    one, two = make_plan(lengths, 500, seed=1).batch(0), make_plan(lengths, 500, seed=2).batch(0)
    assert not np.array_equal(one.pair_ids, two.pair_ids)
    assert not np.array_equal(one.indices, two.indices)


@pytest.mark.parametrize("temperature", [1.0, 5.0, float("inf")])
def test_pairs_are_sampled_by_temperature(temperature: float) -> None:
    sizes = np.array([1000, 100, 10])
    plan = make_plan([[1] * int(size) for size in sizes], 40_000, temperature)
    drawn = np.bincount(plan.batch(0).pair_ids, minlength=3) / 40_000
    weights = sizes ** (1 / temperature)
    assert drawn == pytest.approx(weights / weights.sum(), abs=0.01)


def test_consecutive_epochs_have_different_orders() -> None:
    indices = make_plan([[1] * 50], 150).batch(0).indices.reshape(3, 50)
    assert len({tuple(epoch) for epoch in indices}) == 3
    assert np.abs(indices - np.arange(50)).mean() > 5  # shuffled at all


def test_random_bits_are_uniform_and_addressable() -> None:
    bits = random_bits(100_000, 1, 2)
    assert np.array_equal(random_bits(10, 1, 2, first=500), bits[500:510])
    assert not np.array_equal(random_bits(10, 1, 3), bits[:10])
    ones = ((bits[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)).mean(axis=0)
    assert np.abs(ones - 0.5).max() < 0.01
    assert abs(np.corrcoef(bits[1:].astype(float), bits[:-1].astype(float))[0, 1]) < 0.01


def test_a_million_examples_are_planned_quickly() -> None:
    sizes = np.random.default_rng(0).integers(10, 90, 1_000_000).astype(np.int32)
    began = time.process_time()
    plan = BatchPlan([sizes, sizes], [sizes, sizes], batch_tokens=16_384, temperature=1.0, seed=1)
    assert plan.batch(3000).sample_ids[0] > 900_000
    assert time.process_time() - began < 10


def test_plans_that_cannot_work() -> None:
    with pytest.raises(
        DataError, match=r"example 1 of pair number 1 .* has 31 tokens.*train\.batch_tokens \(30\)"
    ):
        make_plan([[3], [5, 31]], 30)
    with pytest.raises(DataError, match=r"pair number 1 .* has no training example"):
        make_plan([[3], []], 30)
    with pytest.raises(DataError, match="no training data"):
        make_plan([], 30)
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match=r"train\.temperature"):
            make_plan([[3]], 30, temperature)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.integers(1, 5), st.integers(1, 4))
def test_cut_properties(lengths: list[int], ranks: int, micro_batches: int) -> None:
    batch = make_plan([lengths], sum(lengths)).batch(0)
    parts = cut(batch, ranks, micro_batches)
    assert [len(of_rank) for of_rank in parts] == [micro_batches] * ranks
    flat = [part for of_rank in parts for part in of_rank]
    assert sorted(np.concatenate(flat)) == list(range(len(batch)))
    assert all(np.array_equal(part, np.sort(part)) for part in flat)
    # Longest-first bin filling: no part is fuller than another by more than one example.
    loads = [int(batch.lengths[part].sum()) for part in flat]
    assert max(loads) - min(loads) <= int(batch.lengths.max())
    if len(batch) >= len(flat):
        assert all(len(part) for part in flat)
    again = cut(batch, ranks, micro_batches)
    assert all(
        np.array_equal(x, y) for a, b in zip(parts, again, strict=True) for x, y in zip(a, b, strict=True)
    )


def test_few_examples_go_to_different_ranks() -> None:
    batch = make_plan([[10, 10]], 20).batch(0)
    assert [[len(part) for part in of_rank] for of_rank in cut(batch, 2, 2)] == [[1, 0], [1, 0]]


def test_pack_by_hand() -> None:
    packed = pack(
        [
            Example(np.array([2, 10, 11, 1], dtype=np.int32), 2, pair_id=1, sample_id=70),
            Example(np.array([2, 12, 13], dtype=np.int32), 3, pair_id=0, sample_id=71),  # no target
            Example(np.array([2, 14, 1], dtype=np.int32), 1, pair_id=0, sample_id=5),
        ]
    )
    assert packed.input_ids.tolist() == [2, 10, 11, 1, 2, 12, 13, 2, 14, 1]
    assert packed.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2]
    assert packed.pair_ids.tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert packed.segment_ids.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert packed.segment_lengths == (4, 3, 3)
    assert packed.sample_ids.tolist() == [70, 71, 5]
    assert packed.target_positions.tolist() == [1, 2, 7, 8]
    assert packed.targets.tolist() == [11, 1, 14, 1]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=10))
def test_pack_properties(shapes: list[tuple[int, int]]) -> None:
    generator = np.random.default_rng(0)
    examples = [
        Example(generator.integers(3, 99, length).astype(np.int32), min(prompt, length), number % 3, number)
        for number, (length, prompt) in enumerate(shapes)
    ]
    packed = pack(examples)
    assert sum(packed.segment_lengths) == len(packed.input_ids)
    # A target is predicted from the token before it, of the same example, and never from another one.
    assert torch.equal(packed.input_ids[packed.target_positions + 1], packed.targets)
    assert torch.equal(
        packed.segment_ids[packed.target_positions], packed.segment_ids[packed.target_positions + 1]
    )
    expected = [token for e in examples for token in e.input_ids[max(e.prompt_length, 1) :].tolist()]
    assert packed.targets.tolist() == expected


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_replay_has_its_share_of_the_tokens(share: float) -> None:
    lengths, texts = [np.full(300, 12), np.full(100, 20)], np.arange(40, 90)
    replay = Replay(texts, texts - 1, share)
    sizes = {"batch_tokens": 400, "temperature": 2.0, "seed": 3}
    plan = BatchPlan(lengths, [pair // 2 for pair in lengths], **sizes, replay=replay)  # type: ignore[arg-type]
    batches = [plan.batch(step) for step in range(400)]
    ids = np.concatenate([batch.pair_ids for batch in batches])
    assert set(ids.tolist()) == {-1, 0, 1}
    tokens = np.concatenate([batch.lengths for batch in batches])
    assert tokens[ids == -1].sum() / tokens.sum() == pytest.approx(share, rel=0.1)
    # Between the pairs nothing changes.
    assert (ids == 0).sum() / (ids == 1).sum() == pytest.approx(3.0**0.5, rel=0.1)
    for batch in batches[:20]:
        replayed = batch.pair_ids == -1
        assert batch.lengths[replayed].tolist() == texts[batch.indices[replayed]].tolist()
        assert len(batch.target_tokens_per_pair) == 2
        of_texts = int((texts - 1)[batch.indices[replayed]].sum())
        assert batch.target_tokens == batch.target_tokens_per_pair.sum() + of_texts


def test_a_text_that_no_batch_holds() -> None:
    sizes = np.array([5, 9])
    with pytest.raises(DataError, match=r"example 1 of data\.replay has 9 tokens.*train\.batch_tokens \(8\)"):
        BatchPlan(
            [sizes - 4],
            [sizes - 5],
            batch_tokens=8,
            temperature=1.0,
            seed=1,
            replay=Replay(sizes, sizes, 0.1),
        )
