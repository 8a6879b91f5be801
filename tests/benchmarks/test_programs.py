"""Every benchmark starts as a program: without the paths that pytest adds, and says how it is called."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "benchmarks"
PROGRAMS = (
    "acceptance",
    "cluster",
    "detect",
    "faults",
    "memory",
    "parity",
    "plan",
    "resume",
    "scale",
    "step",
    "throughput",
)
# One interpreter for all, because it takes seconds to import what they share.
CALLS = """\
import runpy
import sys

folder, *names = sys.argv[1:]
for name in names:
    path = f"{folder}/{name}.py"
    # As Python does for a program.
    before = list(sys.path)
    sys.path[0], sys.argv = folder, [path, "--help"]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        assert end.code == 0, name
    else:
        raise AssertionError(name)
    sys.path[:] = before
"""


def test_help_of_every_program() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CALLS, FOLDER, *PROGRAMS],
        env={**os.environ, "PYTHONPATH": str(FOLDER.parent)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [name for name in PROGRAMS if f"usage: {name}.py" not in done.stdout] == []
