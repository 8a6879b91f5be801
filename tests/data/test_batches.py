"""Cutting a set of examples over ranks and micro-batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.tiny_run import PAIRS, TinyRun

from lander_ds.common.sizes import rounded_up
from lander_ds.data.batching.micro_batches import packed, whole_split
from lander_ds.data.prepared import PreparedData, PreparedSplit

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def valid(tiny_run: TinyRun) -> dict[int, PreparedSplit]:
    """Validation data by pair id."""
    data = PreparedData.load(tiny_run.run("batches"), tiny_run.recipe("batches"))
    return dict(enumerate(data.split("valid").values()))


def test_a_whole_split(valid: dict[int, PreparedSplit]) -> None:
    batch = whole_split(valid, None)
    assert len(batch) == sum(map(len, valid.values()))
    assert batch.target_tokens == sum(int(split.target_lengths.sum()) for split in valid.values())
    assert np.bincount(batch.pair_ids).tolist() == [len(valid[i]) for i in range(len(PAIRS))]
    assert len(set(batch.sample_ids.tolist())) == len(batch)


def test_a_limit_and_a_missing_pair(valid: dict[int, PreparedSplit]) -> None:
    batch = whole_split({0: valid[0], 2: valid[2]}, 3)
    assert batch.pair_ids.tolist() == [0] * 3 + [2] * 3
    assert batch.indices.tolist() == [*range(3), *range(3)]
    assert batch.lengths.tolist() == [*valid[0].lengths[:3], *valid[2].lengths[:3]]
    assert batch.target_tokens_per_pair.tolist() == [
        valid[0].target_lengths[:3].sum(),
        0,
        valid[2].target_lengths[:3].sum(),
    ]
    [micro] = packed(batch, {0: valid[0], 2: valid[2]}, 0, 1, 1, CPU)
    assert set(micro.pair_ids.tolist()) - {-1} == {0, 2}


@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 1), (2, 3), (4, 1), (3, 40)])
def test_every_example_is_somewhere_once(
    valid: dict[int, PreparedSplit], ranks: int, micro_batches: int
) -> None:
    batch = whole_split(valid, None)
    actual: list[int] = []
    targets = 0
    for rank in range(ranks):
        cuts = list(packed(batch, valid, rank, ranks, micro_batches, CPU))
        assert len(cuts) == micro_batches, "every rank runs the model equally often"
        for micro in cuts:
            real = micro.sample_ids[micro.sample_ids >= 0].tolist()
            actual += real
            targets += len(micro.targets)
            if not real:
                assert micro.pair_ids.tolist() == micro.sample_ids.tolist() == [-1]
                assert len(micro.targets) == 0
    assert sorted(actual) == list(range(len(batch)))
    assert targets == batch.target_tokens


def test_what_is_added_to_a_row_counts_for_nothing(valid: dict[int, PreparedSplit]) -> None:
    batch = whole_split(valid, None)
    micro = list(packed(batch, valid, 0, 1, 3, CPU))
    sizes = [len(one.input_ids) for one in micro]
    assert sizes == [rounded_up(size) for size in sizes]
    real = [one.pair_ids >= 0 for one in micro]
    assert sum(int(kept.sum()) for kept in real) == int(batch.lengths.sum()) < sum(sizes)
    assert sum(len(one.targets) for one in micro) == batch.target_tokens
    for one, kept in zip(micro, real, strict=True):
        assert kept[one.target_positions].all()
        assert (one.sample_ids >= 0).sum() == len(set(one.segment_ids[kept].tolist()))
