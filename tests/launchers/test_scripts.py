"""The shell launchers: syntax, --help, refusals, exit codes, and that a signal stops what they started."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ("setup.sh", "comet_env.sh", "demo.sh", "test.sh")


def run(command: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A repository with nothing but launchers and recipes: there is no .venv a script could use or change."""
    for name in ("launchers", "recipes"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def files(directory: Path) -> set[Path]:
    return {path.relative_to(directory) for path in directory.rglob("*")}


@pytest.mark.parametrize(
    "script", ["launchers/env.sh", *(f"launchers/{name}" for name in SCRIPTS), ".ci/run"]
)
def test_is_valid_bash(script: str) -> None:
    assert run(["bash", "-n", script], ROOT).stderr == ""


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_touches_nothing(clone: Path, script: str, flag: str) -> None:
    before = files(clone)
    result = run([f"launchers/{script}", flag], clone)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"usage: launchers/{script}")
    assert files(clone) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["setup.sh", "--nope"], "unknown argument: --nope"),
        (["comet_env.sh", "--nope"], "unknown argument: --nope"),
        (["demo.sh", "--nope"], "unknown argument: --nope"),
        (["demo.sh", "recipes/demo.yaml"], "unknown argument: recipes/demo.yaml"),
        (["demo.sh", "--ranks"], "--ranks needs a value"),
        (["demo.sh", "--ranks", "0"], "--ranks 0: must be a positive whole number"),
        (["demo.sh", "--ranks", "two"], "--ranks two: must be a positive whole number"),
        (["demo.sh", "--recipe", "recipes/missing.yaml"], "recipes/missing.yaml: no such file"),
    ],
)
def test_refuses_bad_arguments_before_doing_anything(clone: Path, arguments: list[str], message: str) -> None:
    before = files(clone)
    result = run([f"launchers/{arguments[0]}", *arguments[1:]], clone)
    assert result.returncode == 2
    assert message in result.stderr
    assert files(clone) == before


def test_setup_names_the_cure_when_python_is_missing(clone: Path) -> None:
    tools = clone / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "basename", "env"):
        (tools / name).symlink_to(str(shutil.which(name)))
    result = subprocess.run(
        [tools / "bash", "launchers/setup.sh"],
        cwd=clone,
        env={"PATH": str(tools)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 1
    assert "no Python 3.11 or newer found" in result.stderr
    assert not (clone / ".venv").exists()


def test_setup_refuses_a_broken_environment_and_leaves_it_alone(clone: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", clone)
    shutil.copy(ROOT / "requirements.txt", clone)
    python = clone / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to("/nonexistent/python")
    before = files(clone)
    result = run(["launchers/setup.sh"], clone)
    assert result.returncode == 1
    assert "delete it and start again" in result.stderr
    assert files(clone) == before


def test_a_failing_part_ends_the_script_with_its_exit_code(clone: Path) -> None:
    script = clone / "launchers" / "probe.sh"
    script.write_text(
        'set -euo pipefail\nsource "$(dirname "$0")/env.sh"\n'
        "run_part good true\nrun_part bad bash -c 'exit 7'\nrun_part never touch never\n"
    )
    result = run(["bash", str(script)], clone)
    assert result.returncode == 7
    assert "bad failed with exit code 7" in result.stderr
    assert not (clone / "never").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_everything_that_was_started(clone: Path, number: signal.Signals, code: int) -> None:
    script = clone / "launchers" / "probe.sh"
    script.write_text(
        'set -euo pipefail\nsource "$(dirname "$0")/env.sh"\n'
        "run_part part bash -c 'sleep 300 & echo $! >child; wait'\n"
    )
    # Where the tests themselves run in the background, interrupts are ignored, which bash would inherit for good.
    command = ["env", "--default-signal=INT", "bash", str(script)]
    process = subprocess.Popen(command, cwd=clone, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    child_file = clone / "child"
    deadline = time.monotonic() + 30
    while not (child_file.exists() and child_file.read_text().strip()):
        assert time.monotonic() < deadline, "the part did not start"
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=30) == code
    assert not is_alive(int(child_file.read_text()))


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
