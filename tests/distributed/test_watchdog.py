"""The watchdog: who hangs is named, and the job ends within the set time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.plain_ranks import PlainRanks
from support.tiny_run import TinyRun

from lander_ds.common.errors import ExitCode
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.recipe import Recipe
from lander_ds.distributed import collectives, process_group
from lander_ds.distributed.watchdog import GRACE_SECONDS, Watchdog, verdict
from lander_ds.method.collector import StatisticsCollector
from lander_ds.stages import detect

QUIET = 1.0


def report(rank: int, collective: str | None) -> dict[str, Any]:
    return {
        "rank": rank,
        "host": f"host-{rank}",
        "doing": "step 7",
        "collective": collective,
        "place": f"loop.py:{rank} in f",
    }


def wording(collectives: Sequence[str | None], missing: Sequence[int] = ()) -> list[str]:
    reports = {rank: report(rank, name) for rank, name in enumerate(collectives) if rank not in missing}
    return verdict("train", 61.2, reports, len(collectives)).splitlines()


def test_the_rank_outside_a_collective_hangs() -> None:
    assert wording(["all_reduce", None, "all_reduce"]) == [
        "train: nothing has happened for 61 s; the job is ended",
        "  rank 1 on host-1 hangs outside any collective: step 7, loop.py:1 in f",
        "  rank 0 on host-0 waits in all_reduce: step 7, loop.py:0 in f",
        "  rank 2 on host-2 waits in all_reduce: step 7, loop.py:2 in f",
        "start the same command again (train, all: with --auto-resume); train.stall_seconds sets the time",
    ]


@pytest.mark.parametrize("stall", [0.0, 60.0, 1800.0, 7200.0])
def test_collectives_outlast_the_watchdog(stall: float) -> None:
    """NCCL would end the process at its own time-out, before anybody is named."""
    assert process_group.patience(stall) >= max(process_group.COLLECTIVE_SECONDS, stall + 2 * GRACE_SECONDS)


def test_a_rank_without_a_report_is_named_first() -> None:
    lines = wording(["all_reduce", None, "all_reduce"], missing=[2])
    assert lines[1] == "  rank 2 does not answer: it is stopped or gone, or its host is cut off"
    assert "rank 1 on host-1 hangs" in lines[2]


def test_ranks_in_different_collectives_are_all_told() -> None:
    lines = wording(["barrier", "all_reduce"])
    assert "waits in barrier" in lines[1]
    assert "waits in all_reduce" in lines[2]


def hang(directory: Path) -> None:
    with Watchdog(directory, QUIET, "train") as watchdog:
        watchdog.beat("step 3")
        time.sleep(30.0)


def wait_for_a_rank(directory: Path, how: str) -> None:
    """Rank 1 sleeps; the others wait for it in a collective."""
    with Watchdog(directory, QUIET, "train") as watchdog:
        collectives.barrier()
        watchdog.beat("step 5")
        if process_group.rank() == 1:
            time.sleep(30.0)
        if how == "sum":
            collectives.sum_over_ranks(torch.ones(1))
        else:
            collectives.gather_objects(1)


def wait_for_a_stopped_rank(directory: Path, ready: Path) -> None:
    """Rank 1 is stopped from outside."""
    with Watchdog(directory, QUIET, "train") as watchdog:
        collectives.barrier()
        ready.touch()
        while True:
            watchdog.beat("step 5")
            collectives.barrier()


def go_on(directory: Path) -> None:
    """No step takes too long, all of them together do."""
    with Watchdog(directory, QUIET, "train") as watchdog:
        for step in range(8):
            watchdog.beat(f"step {step}")
            time.sleep(QUIET / 4)
    time.sleep(2 * QUIET)


def wait_without_limit(directory: Path) -> None:
    with Watchdog(directory, 0.0, "train"):
        time.sleep(2 * QUIET)


def hang_where_nothing_can_be_written(directory: Path) -> None:
    with Watchdog(directory, QUIET, "train"):
        directory.touch()
        time.sleep(30.0)


def detect_with_a_rank_that_hangs(directory: Path, recipe: Recipe, port: int) -> None:
    """Rank 1 does not come back from its first micro-batch."""
    # Or one leaves the group while the other is still joining it.
    collectives.barrier()
    process_group.stop()
    os.environ.update(LOCAL_RANK=os.environ["RANK"], MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    process_group.start(60.0)
    if process_group.rank() == 1:
        StatisticsCollector.set_pairs = lambda self, pair_ids: time.sleep(60.0)  # type: ignore[method-assign]
    detect.run(recipe, RunDirectory(recipe.run_dir))


def ended(directory: Path, function: Any, *arguments: Any, ranks: int = 1) -> tuple[list[int | None], str]:
    """Exit codes and output of ranks that run a function."""
    processes = PlainRanks(directory, function, directory / "stalled", *arguments, ranks=ranks)
    return processes.wait(), processes.output


@pytest.mark.distributed
def test_it_ends_a_process_that_hangs(tmp_path: Path) -> None:
    codes, output = ended(tmp_path, hang)
    assert codes == [ExitCode.STALLED]
    assert "rank 0 on " in output
    assert "hangs outside any collective: step 3, test_watchdog.py" in output.replace("\n", " ")


@pytest.mark.distributed
@pytest.mark.parametrize(("how", "collective"), [("sum", "all_reduce"), ("gather", "all_gather")])
def test_it_names_the_rank_that_hangs(tmp_path: Path, how: str, collective: str) -> None:
    codes, output = ended(tmp_path, wait_for_a_rank, how, ranks=3)
    assert codes == [ExitCode.STALLED] * 3
    text = " ".join(output.split())
    assert "rank 1 on" in text.partition("hangs outside any collective")[0]
    assert text.count("hangs outside any collective") == 1
    assert text.count(f"waits in {collective}: step 5, collectives.py") == 2


@pytest.mark.distributed
def test_detection_is_watched_too(tmp_path: Path, tiny_run: TinyRun) -> None:
    tiny_run.run("stalled-detection")
    recipe = tiny_run.recipe("stalled-detection", "train.stall_seconds=6")
    codes, output = ended(tmp_path, detect_with_a_rank_that_hangs, recipe, process_group.free_port(), ranks=2)
    assert codes == [ExitCode.STALLED] * 2, output
    text = " ".join(output.split())
    assert "detect: nothing has happened for" in text
    assert "rank 1 on" in text.partition("hangs outside any collective")[0]
    assert not RunDirectory(recipe.run_dir).awareness.exists()


@pytest.mark.distributed
def test_a_stopped_rank_is_named(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    processes = PlainRanks(tmp_path, wait_for_a_stopped_rank, tmp_path / "stalled", ready)
    deadline = time.monotonic() + 40.0
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    pid = processes.processes[1].pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    processes.processes[0].join(30.0)
    processes.kill()
    assert processes.processes[0].exitcode == ExitCode.STALLED
    assert "rank 1 does not answer: it is stopped" in processes.output
    assert "rank 0 on " in processes.output


@pytest.mark.distributed
@pytest.mark.parametrize("function", [go_on, wait_without_limit])
def test_it_lets_a_process_be_that_goes_on(tmp_path: Path, function: Any) -> None:
    codes, output = ended(tmp_path, function)
    assert codes == [0], output


@pytest.mark.distributed
def test_a_disk_that_takes_nothing_does_not_keep_the_job(tmp_path: Path) -> None:
    codes, output = ended(tmp_path, hang_where_nothing_can_be_written)
    assert codes == [ExitCode.STALLED]
    assert "nothing has happened for" in output
