"""Writing checkpoints: in the background, by all ranks, complete or not at all."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from support.plain_ranks import PlainRanks
from support.small import KEEP_ALL, flip, parts, write

from lander_ds.checkpoint import checkpoint, writer
from lander_ds.checkpoint.checkpoint import SELECTION, STATE
from lander_ds.checkpoint.retention import Retention
from lander_ds.checkpoint.writer import Parts, SaveFailed, Writer, remove_all
from lander_ds.distributed import process_group


class Slow(Mapping[str, torch.Tensor]):
    """Tensors that can only be read once a gate is open."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], gate: threading.Event) -> None:
        self._tensors, self._gate = tensors, gate

    def __getitem__(self, name: str) -> torch.Tensor:
        assert self._gate.wait(30.0)
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class FullDisk(Slow):
    """Tensors that cannot be written."""

    def __init__(self) -> None:
        super().__init__({"weight": torch.ones(2)}, threading.Event())

    def __getitem__(self, name: str) -> torch.Tensor:
        raise OSError(errno.ENOSPC, "No space left on device")


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_everything_comes_back(tmp_path: Path) -> None:
    path = write(tmp_path / "checkpoints", 7, method="lander", progress={"done": 7})
    assert names(path) == [
        "optimizer-0.safetensors",
        "selection.safetensors",
        "state.json",
        "trained-0.safetensors",
    ]
    actual = checkpoint.load(path).verified()
    kept = parts(7)
    for tensors, expected in ((actual.trained(), kept.trained), (actual.optimizer(), kept.optimizer)):
        assert set(tensors) == set(expected)
        assert all(torch.equal(tensors[name], value) for name, value in expected.items())
    assert (actual.step, actual.state["method"], actual.state["progress"]) == (7, "lander", {"done": 7})
    assert (path / SELECTION).read_bytes() == b"a selection"


def test_an_optimizer_without_state_has_no_file(tmp_path: Path) -> None:
    saving = Writer(tmp_path, KEEP_ALL, background=False)
    saving.save(1, Parts({"weight": torch.ones(2)}, {}), {}, None)
    saving.finish()
    assert names(tmp_path / "step-1") == ["state.json", "trained-0.safetensors"]
    assert len(checkpoint.newest(tmp_path).optimizer()) == 0


def test_twelve_bytes_a_parameter(tmp_path: Path) -> None:
    count = 100_000
    weights = {f"weight.{i}": torch.zeros(count // 10) for i in range(10)}
    moments = {
        f"{kind}/{name}": value.clone()
        for kind in ("exp_avg", "exp_avg_sq")
        for name, value in weights.items()
    }
    saving = Writer(tmp_path, KEEP_ALL, background=False)
    saving.save(1, Parts(weights, moments), {}, None)
    saving.finish()
    size = sum(file.stat().st_size for file in (tmp_path / "step-1").iterdir())
    assert 12.0 <= size / count < 12.1


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    gate = threading.Event()
    saving = Writer(tmp_path, KEEP_ALL, background=True)
    saving.save(3, Parts(Slow(parts(3).trained, gate), {}), {}, None)
    # Here training goes on; there is no checkpoint before all of it is there.
    assert checkpoint.steps(tmp_path) == []
    gate.set()
    saving.finish()
    assert checkpoint.newest(tmp_path).step == 3


def test_in_the_foreground_it_is_there_at_once(tmp_path: Path) -> None:
    saving = Writer(tmp_path, KEEP_ALL, background=False)
    saving.save(3, parts(3), {}, None)
    assert checkpoint.newest(tmp_path).step == 3


def test_one_after_the_other(tmp_path: Path) -> None:
    gate = threading.Event()
    saving = Writer(tmp_path, KEEP_ALL, background=True)
    saving.save(3, Parts(Slow(parts(3).trained, gate), {}), {}, None)
    opener = threading.Timer(0.2, gate.set)
    opener.start()
    saving.save(4, parts(4), {}, None)
    assert gate.is_set()
    assert 3 in checkpoint.steps(tmp_path)
    saving.finish()
    assert checkpoint.steps(tmp_path) == [3, 4]


def test_nothing_to_finish(tmp_path: Path) -> None:
    Writer(tmp_path / "checkpoints", KEEP_ALL, background=True).finish()
    assert names(tmp_path / "checkpoints") == []


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    for name in (".step-3.00ff00ff.tmp", ".step-2.old.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trained-0.safetensors").write_bytes(b"half")
    write(tmp_path / "other", 1)
    Writer(tmp_path, KEEP_ALL, background=True)
    assert names(tmp_path) == ["other", "selection.safetensors"]


def test_two_starts_write_in_different_places(tmp_path: Path) -> None:
    """A rank of a killed run that still lives must not mix its files into those of the next one."""
    gate = threading.Event()
    old = Writer(tmp_path, KEEP_ALL, background=True)
    new = Writer(tmp_path, KEEP_ALL, background=True)
    old.save(3, Parts(Slow({"old": torch.zeros(2)}, gate), {}), {}, None)
    new.save(3, Parts(Slow({"new": torch.ones(2)}, gate), {}), {}, None)
    while len(list(tmp_path.glob(".step-3.*.tmp"))) < 2:
        time.sleep(0.01)
    gate.set()
    old.finish()
    new.finish()
    assert all(len(checkpoint.load(path).verified().trained()) == 1 for path in tmp_path.iterdir())


def test_a_failure_is_told_and_the_next_one_is_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "checkpoints", 1)
    saving = Writer(tmp_path / "checkpoints", KEEP_ALL, background=True)
    saving.save(2, Parts(FullDisk(), {}), {}, None)
    saving.save(3, parts(3), {}, None)
    [wording] = caplog.messages
    assert "step-2 could not be written: rank 0 on " in wording
    assert "No space left on device; training goes on" in wording
    saving.finish()
    assert names(tmp_path / "checkpoints") == ["step-1", "step-3"]


def test_a_failure_at_the_end_has_an_exit_code(tmp_path: Path) -> None:
    write(tmp_path / "checkpoints", 1)
    saving = Writer(tmp_path / "checkpoints", KEEP_ALL, background=True)
    saving.save(2, Parts(FullDisk(), {}), {}, None)
    with pytest.raises(
        SaveFailed, match=r"No space left.*earlier checkpoints are whole.*--auto-resume"
    ) as failed:
        saving.finish()
    assert failed.value.exit_code == 74
    assert names(tmp_path / "checkpoints") == ["step-1"]
    saving.finish()


def test_without_its_selection_there_is_no_checkpoint(tmp_path: Path) -> None:
    saving = Writer(tmp_path, KEEP_ALL, background=True)
    saving.save(2, parts(2), {}, tmp_path / "selection.safetensors")
    with pytest.raises(SaveFailed, match=r"selection\.safetensors"):
        saving.finish()
    assert names(tmp_path) == []


def test_a_damaged_one_is_kept_beside_the_new_one(tmp_path: Path) -> None:
    for _ in range(2):
        flip(write(tmp_path / "checkpoints", 5) / "trained-0.safetensors")
    write(tmp_path / "checkpoints", 5)
    assert names(tmp_path / "checkpoints") == ["step-5", "step-5.replaced-1", "step-5.replaced-2"]
    assert checkpoint.newest(tmp_path / "checkpoints").step == 5
    for number in (1, 2):
        assert not (tmp_path / "checkpoints" / f"step-5.replaced-{number}" / STATE).samefile(
            tmp_path / "checkpoints" / "step-5" / STATE
        )


def test_one_that_cannot_be_deleted_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "checkpoints", 1)
    obstacle = tmp_path / "checkpoints" / ".step-1.old.tmp"
    saving = Writer(tmp_path / "checkpoints", Retention(last=1), background=False)
    obstacle.mkdir()
    (obstacle / "file").touch()
    saving.save(2, parts(2), {}, None)
    saving.finish()
    assert checkpoint.steps(tmp_path / "checkpoints") == [1, 2]
    assert any("cannot delete" in message for message in caplog.messages)


def test_remove_all(tmp_path: Path) -> None:
    for step in (1, 2):
        write(tmp_path / "checkpoints", step)
    (tmp_path / "checkpoints" / "notes").mkdir()
    remove_all(tmp_path / "checkpoints")
    assert names(tmp_path / "checkpoints") == ["notes"]


def write_as_a_rank(directory: Path, fails: int, selection: Path) -> None:
    """Two checkpoints; the second fails on one rank."""
    rank = process_group.rank()
    saving = Writer(directory, KEEP_ALL, background=True)
    saving.save(1, parts(1, rank), {"ranks": process_group.world_size()}, selection)
    saving.save(2, Parts(FullDisk(), {}) if rank == fails else parts(2, rank), {}, selection)
    try:
        saving.finish()
    except SaveFailed as error:
        (directory.parent / f"failure-{rank}.txt").write_text(str(error))


@pytest.mark.distributed
@pytest.mark.parametrize("fails", [0, 1])
def test_all_ranks_write_or_none(tmp_path: Path, fails: int) -> None:
    selection = tmp_path / "selection.safetensors"
    selection.write_bytes(b"a selection")
    ranks = PlainRanks(tmp_path, write_as_a_rank, tmp_path / "checkpoints", fails, selection)
    assert ranks.wait() == [0, 0], ranks.output
    actual = checkpoint.newest(tmp_path / "checkpoints")
    assert (actual.step, actual.state["ranks"]) == (1, 2)
    assert set(actual.trained()) == {"weight.0", "weight.1"}
    assert set(actual.optimizer()) == {
        f"exp_avg{kind}/weight.{rank}" for kind in ("", "_sq") for rank in (0, 1)
    }
    files = sorted(json.loads((actual.path / STATE).read_text())["files"])
    assert files == sorted(path.name for path in actual.path.iterdir() if path.name != STATE)
    for rank in (0, 1):
        wording = (tmp_path / f"failure-{rank}.txt").read_text()
        assert f"step-2 could not be written: rank {fails} on {os.uname().nodename}: " in wording
        assert "No space left on device" in wording


def write_without_rank_one(directory: Path) -> None:
    """Rank 1 never writes its part."""
    writer.REPORT_SECONDS = 0.5
    saving = Writer(directory, KEEP_ALL, background=True)
    if process_group.rank() == 1:
        saving._work = lambda *_: None  # type: ignore[method-assign]
    saving.save(1, parts(1, process_group.rank()), {}, None)
    try:
        saving.finish()
    except SaveFailed as error:
        (directory.parent / f"failure-{process_group.rank()}.txt").write_text(str(error))


@pytest.mark.distributed
def test_a_rank_that_does_not_report(tmp_path: Path) -> None:
    ranks = PlainRanks(tmp_path, write_without_rank_one, tmp_path / "checkpoints")
    assert ranks.wait() == [0, 0], ranks.output
    assert names(tmp_path / "checkpoints") == []
    assert "ranks 1 did not report" in (tmp_path / "failure-0.txt").read_text()


def write_for_ever(directory: Path, first: int) -> None:
    saving = Writer(directory, Retention(last=2), background=True)
    big = {f"weight.{process_group.rank()}": torch.ones(200_000)}
    for step in range(first, first + 10_000):
        saving.save(step, Parts(big, {}), {}, None)


@pytest.mark.distributed
def test_killed_at_any_moment(tmp_path: Path) -> None:
    """Every directory called step-N is whole, and what was there is there again or followed by two others."""
    directory, moments = tmp_path / "checkpoints", random.Random(3)
    before = 0
    for _ in range(5):
        ranks = PlainRanks(tmp_path, write_for_ever, directory, before + 1)
        while not directory.exists() or max(checkpoint.steps(directory), default=0) <= before:
            time.sleep(0.005)
        time.sleep(moments.uniform(0.0, 0.3))
        present = checkpoint.steps(directory)
        ranks.kill()
        actual = checkpoint.steps(directory)
        assert actual[-1] >= present[-1] > before
        for step in actual:
            assert set(checkpoint.load(directory / f"step-{step}").verified().trained()) == {
                "weight.0",
                "weight.1",
            }
        before = actual[-1]
    Writer(directory, KEEP_ALL, background=True)
    assert names(directory) == [f"step-{step}" for step in sorted(checkpoint.steps(directory), key=str)]
    shutil.rmtree(directory)
