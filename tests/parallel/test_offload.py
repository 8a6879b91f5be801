"""Optimizer state in host memory: DeepSpeed's own CPU Adam takes over and trains the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from support.compare import distance, metrics, relative, trained
from support.tiny_run import DEEPSPEED, TinyRun
from support.training_runs import ADAMW
from support.worlds import Job, run_world, search_path

COMPILE_SECONDS = 900
COMPILE = "from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load(verbose=False)"


@pytest.fixture(scope="module")
def offloaded(world_2: TinyRun) -> TinyRun:
    """The job `adamw` again, on two ranks, with an offloaded optimizer."""
    # Compiled before the ranks start, since it takes minutes where it was never compiled before.
    compiled = [sys.executable, "-c", COMPILE]
    subprocess.run(compiled, check=True, timeout=COMPILE_SECONDS, env={**os.environ, "PATH": search_path()})
    zero = {**DEEPSPEED["zero_optimization"], "offload_optimizer": {"device": "cpu"}}
    config = world_2.root / "offload.json"
    config.write_text(json.dumps({**DEEPSPEED, "zero_optimization": zero}))
    run_world(world_2.root, 2, [Job("offload", (*ADAMW, f"deepspeed={config}"))])
    return world_2


@pytest.mark.skipif(shutil.which("c++") is None, reason="DeepSpeed compiles its CPU Adam with a C++ compiler")
@pytest.mark.distributed
@pytest.mark.timeout(COMPILE_SECONDS + 300)
def test_losses_and_weights_are_those_of_torchs_adamw(offloaded: TinyRun) -> None:
    found, expected = offloaded.run("offload-2"), offloaded.run("adamw-2")
    for key in ("loss", "grad_norm"):
        assert relative([r[key] for r in metrics(found)], [r[key] for r in metrics(expected)]) < 1e-4
    assert distance(trained(found), trained(expected)) < 1e-4
    summary = json.loads(found.training_summary.read_text())
    assert summary["frozen_unchanged"]
    share = 12 * summary["trained_parameters"] / 2
    assert summary["optimizer_bytes_per_rank"] == pytest.approx([share] * 2, rel=0.02)
