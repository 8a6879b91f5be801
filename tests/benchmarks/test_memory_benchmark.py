"""benchmarks/memory.py on a small model: every case is measured, and stays within its bound."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
import time
from pathlib import Path

import pytest
from memory import MIB, Sampler, sizes

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "memory.py"


@pytest.mark.parametrize(("wanted", "tolerance"), [(1e9, 0.05), (100e6, 0.8), (7e9, 0.05)])
def test_models_have_about_the_size_that_was_asked_for(wanted: float, tolerance: float) -> None:
    shape = sizes(wanted)
    width = shape["hidden_size"]
    parameters = 2 * 32_000 * width + shape["num_hidden_layers"] * 16 * width * width
    assert abs(parameters / wanted - 1) < tolerance


def test_the_sampler_sees_memory_that_was_given_back() -> None:
    # Straight from the kernel: an allocator may have memory left over from other tests.
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with Sampler() as sampler, mmap.mmap(-1, 64 * MIB, flags=private) as holding:
        for _ in range(64):
            holding.write(bytes([1]) * MIB)
        deadline = time.monotonic() + 30
        while sampler.growth < 60 * MIB and time.monotonic() < deadline:
            time.sleep(0.01)
    assert 60 * MIB < sampler.growth < 100 * MIB


@pytest.mark.long
def test_a_small_model(tmp_path: Path) -> None:
    options = [
        "--parameters",
        "1e6",
        "--json",
        "--directory",
        str(tmp_path),
        "--cases",
        "import-quarter",
        "delta",
    ]
    command = [sys.executable, str(SCRIPT), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    actual = json.loads(done.stdout)
    assert actual["bounded"]
    assert set(actual["cases"]) == {"import-quarter", "delta"}
    cases = actual["cases"]
    assert 0 < cases["import-quarter"]["kept_bytes"] < actual["model_bytes"]
    for case in cases.values():
        assert case["bounded"] == (case["beyond_kept_bytes"] <= case["bound_bytes"])
    assert not list(tmp_path.iterdir()), "nothing is left behind"
