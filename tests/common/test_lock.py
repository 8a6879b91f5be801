"""One process at a time, whatever becomes of the one before."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lander_ds.common import lock
from lander_ds.common.errors import ArtefactError
from lander_ds.common.lock import locked

HOLDER = """
import sys, time
from pathlib import Path
from lander_ds.common.lock import locked
with locked(Path(sys.argv[1]), "it"):
    print("locked", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holder(path: Path, seconds: float = 60.0) -> subprocess.Popen[str]:
    """A process that holds the lock already."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / ".train.lock"


def test_it_is_given_back(path: Path) -> None:
    for _ in range(2):
        with locked(path, "it"):
            assert path.exists()
        assert list(path.parent.iterdir()) == []
    with pytest.raises(KeyError), locked(path, "it"):
        raise KeyError
    assert list(path.parent.iterdir()) == []


def test_a_living_holder_is_named_and_stays_the_holder(path: Path) -> None:
    process = holder(path)
    try:
        message = rf"stage train is being worked on by process {process.pid} on .*wait until it has ended, or use another"
        with pytest.raises(ArtefactError, match=message), locked(path, "stage train", patience=0.2):
            pass
        assert json.loads(path.read_text())["pid"] == process.pid
    finally:
        process.kill()
        process.wait()


def test_the_end_of_the_holder_is_waited_for(path: Path) -> None:
    process = holder(path, seconds=1.0)
    with locked(path, "it"):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert process.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_holder_holds_nothing(path: Path, number: int) -> None:
    process = holder(path)
    process.send_signal(number)
    process.wait()
    assert path.exists()
    began = time.monotonic()
    with locked(path, "it", patience=60.0):
        assert time.monotonic() - began < 30.0
    assert list(path.parent.iterdir()) == []


def test_another_process_with_the_same_number_is_another(path: Path) -> None:
    with locked(path, "it"):
        owner = json.loads(path.read_text())
    path.write_text(json.dumps({**owner, "started": owner["started"] - 100.0}))
    with locked(path, "it", patience=60.0):
        pass


def test_on_another_machine_who_gives_no_sign_of_life_has_ended(path: Path) -> None:
    with locked(path, "it"):
        owner = json.loads(path.read_text())
    # Its number means nothing here.
    path.write_text(json.dumps({**owner, "machine": "another", "host": "node7"}))
    began = time.monotonic()
    with locked(path, "it", patience=1.0):
        assert time.monotonic() - began >= 1.0


def test_on_another_machine_who_gives_signs_of_life_is_waited_for_in_vain(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.1)
    machine = lock._machine
    with locked(path, "it"):
        monkeypatch.setattr(lock, "_machine", lambda: "mine")
        with pytest.raises(ArtefactError, match="is being worked on by"), locked(path, "it", patience=1.5):
            pass
        monkeypatch.setattr(lock, "_machine", machine)
        assert path.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_damaged_lock_of_nobody_is_passed_over(path: Path, text: str) -> None:
    path.parent.mkdir()
    path.write_text(text)
    with locked(path, "it", patience=0.5):
        pass
    assert list(path.parent.iterdir()) == []


def test_of_many_one_at_a_time(path: Path) -> None:
    inside: list[int] = []

    def work(number: int) -> int:
        with locked(path, "it", patience=60.0):
            inside.append(number)
            assert len(inside) == 1
            time.sleep(0.05)
            inside.remove(number)
        return number

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(work, range(4))) == [0, 1, 2, 3]


def test_nobody_gives_back_what_is_anothers(path: Path) -> None:
    with locked(path, "it"):
        other = {**json.loads(path.read_text()), "token": "another"}
        path.write_text(json.dumps(other))
    assert json.loads(path.read_text()) == other


def test_a_host_that_says_nothing_is_not_taken_for_a_living_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is given longer than a process of this machine, because file systems stall."""
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(lock, "SILENCE_SECONDS", 2.0)
    with locked(path, "it"):
        owner = json.loads(path.read_text())
    path.write_text(json.dumps({**owner, "machine": "another", "host": "node7"}))
    began = time.monotonic()
    with locked(path, "it"):
        assert time.monotonic() - began >= 2.0


def test_who_was_taken_for_dead_ends(path: Path) -> None:
    code = HOLDER.replace(
        "with locked", "import lander_ds.common.lock as m; m.BEAT_SECONDS = 0.1\nwith locked"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path), "60"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    path.write_text(json.dumps({**json.loads(path.read_text()), "host": "node7", "token": "another"}))
    _, wording = process.communicate(timeout=60)
    assert process.returncode == 2
    assert b"this process was taken for dead" in wording
