"""Collectives on one process without a group, and on two and four ranks."""

from __future__ import annotations

import json

import pytest
import torch
from support.jobs import NOTES
from support.tiny_run import TinyRun

from lander_ds.parallel import comm


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
    assert (comm.rank(), comm.world_size()) == (0, 1)
    assert comm.sum_over_ranks(value) is value
    assert comm.gather_objects("one") == ["one"]
    assert comm.from_rank_zero("one") == "one"
    assert list(comm.share("abc")) == ["a", "b", "c"]
    comm.barrier()
    comm.stop()
