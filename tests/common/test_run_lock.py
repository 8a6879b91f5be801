"""Who may train in a run directory: not two at once, whoever was killed before, on whatever host."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lander_ds.common import run_lock
from lander_ds.common.errors import ArtefactError
from lander_ds.common.run_lock import Holder, RunLock

HOLD = """
import sys, time
from pathlib import Path
from lander_ds.common.run_lock import RunLock
RunLock(Path(sys.argv[1])).take()
print("taken", flush=True)
time.sleep(100)
"""


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(run_lock, "POLL_SECONDS", 0.05)


def training(path: Path) -> subprocess.Popen[str]:
    """A process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "taken\n"
    return process


def of_another_host(path: Path, age: float) -> None:
    """A lock as another host left it that many seconds ago."""
    holder = Holder("node7", os.getpid(), "another machine", 17, "abc")
    path.write_text(json.dumps(vars(holder)), encoding="utf-8")
    os.utime(path, (time.time() - age,) * 2)


def test_a_second_training_is_refused_by_name_until_the_first_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "training-lock.json"
    first = training(path)
    with pytest.raises(
        ArtefactError, match=rf"training-lock.json: process {first.pid} on .*, or choose another run_dir"
    ):
        RunLock(path).take()
    # Killed, and not even buried.
    first.send_signal(signal.SIGKILL)
    lock = RunLock(path)
    lock.take()
    assert first.wait() == -signal.SIGKILL
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_later_process_of_the_same_number_is_another(tmp_path: Path) -> None:
    path, this = tmp_path / "training-lock.json", Holder.this()
    before = Holder(this.host, this.pid, this.machine, this.began - 1, "abc")
    path.write_text(json.dumps(vars(before)), encoding="utf-8")
    lock = RunLock(path)
    lock.take()
    lock.release()


def test_another_host_that_beats_is_alive(tmp_path: Path) -> None:
    path = tmp_path / "training-lock.json"
    of_another_host(path, 5.0)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.2):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(ArtefactError, match=r"on node7 trains in this run directory.* delete .*training-lock\.json"):
        RunLock(path).take()
    ended.set()
    thread.join()
    assert json.loads(path.read_text(encoding="utf-8"))["host"] == "node7"


@pytest.mark.parametrize("age", [run_lock.STALE_SECONDS + 5, run_lock.STALE_SECONDS - 1])
def test_a_host_that_has_gone_is_not_waited_for_long(tmp_path: Path, age: float) -> None:
    path = tmp_path / "training-lock.json"
    of_another_host(path, age)
    lock = RunLock(path)
    lock.take()
    assert json.loads(path.read_text(encoding="utf-8"))["pid"] == os.getpid()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_half_a_file_of_a_process_that_was_killed_over_it_locks_nobody_out(tmp_path: Path) -> None:
    path = tmp_path / "training-lock.json"
    path.write_text('{"host": "no', encoding="utf-8")
    os.utime(path, (time.time() - 1000,) * 2)
    lock = RunLock(path)
    lock.take()
    lock.release()


def _try(path: str, started: float, ended: float) -> bool:
    """Whether this process, one of many at once, got the lock and held it until the others had tried."""
    run_lock.GRACE_SECONDS, run_lock.BEAT_SECONDS, run_lock.POLL_SECONDS = 0.5, 0.2, 0.01
    time.sleep(max(0.0, started - time.time()))
    try:
        lock = RunLock(Path(path))
        lock.take()
    except ArtefactError:
        return False
    time.sleep(max(0.0, ended - time.time()))
    return True


@pytest.mark.parametrize(
    "prepare", [lambda path: None, lambda path: of_another_host(path, 1000.0)], ids=["none", "stale"]
)
def test_of_many_at_once_one_gets_it(tmp_path: Path, prepare: Callable[[Path], None]) -> None:
    path = tmp_path / "training-lock.json"
    prepare(path)
    now = time.time()
    with multiprocessing.get_context("forkserver").Pool(6) as pool:
        results = pool.starmap(_try, [(str(path), now + 3, now + 7)] * 6)
    assert sum(results) == 1


def test_who_was_taken_for_dead_ends(tmp_path: Path) -> None:
    path = tmp_path / "training-lock.json"
    code = HOLD.replace(
        "RunLock(Path", "import lander_ds.common.run_lock as m; m.BEAT_SECONDS = 0.1\nRunLock(Path"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    of_another_host(path, 0.0)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 2
    assert b"belongs to process" in told


def test_nobody_gives_back_what_is_anothers(tmp_path: Path) -> None:
    path = tmp_path / "training-lock.json"
    of_another_host(path, 0.0)
    RunLock(path).release()
    assert path.exists()
