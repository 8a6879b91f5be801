"""Collectives on one process without a group, and on two and four ranks."""

from __future__ import annotations

import json

import pytest
import torch
from support.jobs import NOTES
from support.tiny_run import TinyRun

from lander_ds.distributed import collectives, process_group


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_rank_gets_the_same(request: pytest.FixtureRequest, ranks: int) -> None:
    runs: TinyRun = request.getfixturevalue(f"world_{ranks}")
    total = ranks * (ranks + 1) / 2
    for rank in range(ranks):
        notes = json.loads((runs.run(f"collectives-{ranks}").path / f"{rank}-{NOTES}").read_text())
        assert notes == {
            "sum": [total, total],
            "same": True,
            "gathered": [{"rank": other} for other in range(ranks)],
            "from_zero": "of rank 0",
            "share": list(range(rank, 10, ranks)),
        }


def test_one_process_needs_no_group() -> None:
    value = torch.ones(2)
    assert (process_group.rank(), process_group.world_size()) == (0, 1)
    assert collectives.sum_over_ranks(value) is value
    assert collectives.gather_objects("one") == ["one"]
    assert collectives.from_rank_zero("one") == "one"
    assert list(collectives.share("abc")) == ["a", "b", "c"]
    collectives.barrier()
    process_group.stop()
