"""launchers/supervise.py with launchers that lose exit codes, hang, die and forget processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import guard
import pytest
from supervise import LOST, cause, resumed

LAUNCHERS = Path(__file__).parents[2] / "launchers"
RANK = f"{sys.executable} {LAUNCHERS / 'rank.py'}"
SAVES = "trap 'exit 75' TERM; echo here >started; while :; do sleep 0.1; done"


@pytest.fixture
def launch_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "launch"
    directory.mkdir()
    (directory / "arguments").write_text("train\0--recipe\0r.yaml\0--force\0")
    return directory


def start(launch_dir: Path, script: str, *options: str) -> subprocess.Popen[str]:
    """Supervise a launcher of two ranks that is a shell script; `rank N COMMAND` runs one."""
    prelude = f'rank() {{ local n=$1; shift; {RANK} {launch_dir} $n bash -c "$1"; }}\n'
    command = [
        *(sys.executable, str(LAUNCHERS / "supervise.py"), "--launch-dir", str(launch_dir), "--ranks", "2"),
        *("--restart-seconds", "0.1", "--linger-seconds", "1", "--lease-seconds", "4", *options),
        *("--", "bash", "-c", prelude + script),
    ]
    return subprocess.Popen(command, cwd=launch_dir.parent, stderr=subprocess.PIPE, text=True)


def supervise(launch_dir: Path, script: str, *options: str) -> tuple[int, str]:
    """Its exit code, and what it said."""
    process = start(launch_dir, script, *options)
    said = process.communicate(timeout=60)[1]
    assert guard.processes(str(launch_dir)) == []
    return process.returncode, said


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("rank 0 'exit 0'; rank 1 'exit 0'", 0),
        # As pdsh, when a link is cut after the work was done.
        ("rank 0 'exit 0'; rank 1 'exit 0'; exit 255", 0),
        # As pdsh, when it is killed: 0, and ranks that never ended.
        ("rank 0 'exit 0'; exit 0", 1),
        ("exit 3", 3),
        ("rank 0 'exit 2'; rank 1 'exit 2'; exit 1", 2),
        ("rank 0 'kill -KILL $$'; rank 1 'exit 1'; exit 1", 137),
        ("rank 0 'exit 75'; rank 1 'exit 75'; exit 1", 75),
        ("rank 0 'exit 76'; exit 1", 76),
        ("kill -KILL $$", 137),
    ],
)
def test_the_exit_code_is_that_of_the_ranks(launch_dir: Path, script: str, code: int) -> None:
    assert supervise(launch_dir, script)[0] == code
    assert not launch_dir.exists()


def test_a_rank_without_exit_code_is_named(launch_dir: Path) -> None:
    assert "ranks 1 left no exit code" in supervise(launch_dir, "rank 0 'exit 0'")[1]


@pytest.mark.parametrize(
    ("codes", "telling"),
    [
        ({0: 0, 1: 0}, 0),
        ({0: 75, 1: 1}, 1),
        ({0: 1, 1: 137}, 137),
        ({0: 137, 1: 76}, 76),
        ({0: 2, 1: 143}, 2),
        ({0: 75, 1: 0}, 75),
    ],
)
def test_the_cause_among_consequences(codes: dict[int, int], telling: int) -> None:
    assert cause(codes) == telling


def test_only_stages_that_resume_are_told_to() -> None:
    assert resumed(["train", "--force"]) == ["train", "--auto-resume"]
    assert resumed(["all", "--auto-resume"]) == ["all", "--auto-resume"]
    assert resumed(["detect", "--force"]) == ["detect"]


ATTEMPTS = """
count=$(($(cat count 2>/dev/null || echo 0) + 1)); echo $count >count
tr '\\0' ' ' <launch/arguments >arguments.$count
"""


def test_a_restart_resumes_and_does_not_force(launch_dir: Path) -> None:
    script = f"{ATTEMPTS} if ((count == 1)); then rank 0 'exit 76'; else rank 0 true; rank 1 true; fi"
    code, said = supervise(launch_dir, script, "--max-restarts", "3")
    assert code == 0
    assert "restart 1 of 3" in said
    root = launch_dir.parent
    assert (root / "arguments.1").read_text() == "train --recipe r.yaml --force "
    assert (root / "arguments.2").read_text() == "train --recipe r.yaml --auto-resume "


@pytest.mark.parametrize(("code", "attempts"), [(75, 3), (1, 3), (2, 1), (74, 1)])
def test_restarts_are_bounded_and_not_for_every_code(launch_dir: Path, code: int, attempts: int) -> None:
    script = f"{ATTEMPTS} rank 0 'exit {code}'"
    assert supervise(launch_dir, script, "--max-restarts", "2")[0] == code
    assert int((launch_dir.parent / "count").read_text()) == attempts


def test_a_launcher_that_hangs_is_killed_with_all_it_started(launch_dir: Path) -> None:
    script = "setsid sleep 300 & rank 0 'exit 1' & trap '' TERM INT; while :; do sleep 1; done"
    code, said = supervise(launch_dir, script)
    assert code == 1
    assert "does not end" in said


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)]
)
def test_a_signal_lets_the_ranks_save(launch_dir: Path, number: signal.Signals, code: int) -> None:
    script = f'rank 0 "{SAVES}" & rank 1 "{SAVES}" & wait'
    process = start(launch_dir, script, "--max-restarts", "5")
    wait_for(launch_dir.parent / "started")
    time.sleep(0.5)
    process.send_signal(number)
    assert "asked to save" in process.communicate(timeout=60)[1]
    assert process.returncode == code
    assert guard.processes(str(launch_dir)) == []


def test_a_second_signal_does_not_wait(launch_dir: Path) -> None:
    script = "rank 0 \"trap '' TERM; echo here >started; while :; do sleep 0.1; done\""
    process = start(launch_dir, script)
    wait_for(launch_dir.parent / "started")
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert guard.processes(str(launch_dir)) == []


def test_nothing_survives_the_launch(launch_dir: Path) -> None:
    process = start(launch_dir, "rank 0 'echo here >started; sleep 300'")
    wait_for(launch_dir.parent / "started")
    process.kill()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while guard.processes(str(launch_dir)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_killed_wrapper_takes_its_rank_along(launch_dir: Path) -> None:
    script = "rank 0 'echo $$ $PPID >started; sleep 300'; exit 247"
    process = start(launch_dir, script)
    wait_for(launch_dir.parent / "started")
    time.sleep(0.2)
    rank, wrapper = map(int, (launch_dir.parent / "started").read_text().split())
    os.kill(wrapper, signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == 247
    with pytest.raises(ProcessLookupError):
        os.kill(rank, 0)


def fake_ssh(tmp_path: Path, body: str) -> str:
    """What is called in place of ssh; the last argument is the command for the host."""
    script = tmp_path / "ssh"
    script.write_text(f'#!/usr/bin/env bash\nhost="${{@: -2:1}}" command="${{@: -1}}"\n{body}\n')
    script.chmod(0o755)
    return str(script)


def test_a_host_that_does_not_answer_is_named_and_nothing_is_started(launch_dir: Path) -> None:
    ssh = fake_ssh(
        launch_dir.parent, 'if [[ "$host" == b ]]; then echo no route >&2; exit 255; fi; eval "$command"'
    )
    code, said = supervise(launch_dir, "touch never", "--hosts", "a,b", "--ssh", ssh)
    assert code == LOST
    assert "b is lost" in said
    assert "no route" in said
    assert not (launch_dir.parent / "never").exists()


def test_a_host_that_is_lost_on_the_way_ends_the_launch(launch_dir: Path) -> None:
    ssh = fake_ssh(
        launch_dir.parent, 'if [[ "$host" == b ]]; then (sleep 2; kill $$) & fi; eval "exec $command"'
    )
    code, said = supervise(launch_dir, "rank 0 'sleep 300'", "--hosts", "a,b", "--ssh", ssh)
    assert code == LOST
    assert "b is lost" in said


def test_a_host_that_does_not_see_the_run_directory_is_told_apart(launch_dir: Path) -> None:
    ssh = fake_ssh(launch_dir.parent, 'eval "${command//launch 4/elsewhere 4}"')
    code, said = supervise(launch_dir, "touch never", "--hosts", "a", "--ssh", ssh)
    assert code == LOST
    assert "run_dir must be a directory that all hosts share" in said
