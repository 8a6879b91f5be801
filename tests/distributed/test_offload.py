"""Optimizer state in host memory: DeepSpeed's own CPU Adam takes over and trains the same."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from support.compare import distance, metrics, relative, trained
from support.cpu_adam import COMPILE_SECONDS, compile_cpu_adam
from support.stage_runs import PIPELINE, REPLICATED, ZERO3, staged
from support.tiny_run import JSONS, TinyRun
from support.training_runs import ADAMW
from support.worlds import Job, run_world


@pytest.fixture(scope="module")
def offloaded(world_2: TinyRun) -> TinyRun:
    """The job `adamw` again, on two ranks and in every topology, with an offloaded optimizer."""
    compile_cpu_adam()
    jobs = [
        Job("zero3-offload", ADAMW),
        staged(REPLICATED, 1, 2, "offload", ADAMW),
        *(staged(name, 2, 2, "offload", ADAMW) for name in (PIPELINE, ZERO3)),
    ]
    own = []
    for job, topology in zip(jobs, ("zero3", REPLICATED, PIPELINE, ZERO3), strict=True):
        config = JSONS[topology]
        zero = {**config["zero_optimization"], "offload_optimizer": {"device": "cpu"}}
        path = world_2.root / f"{topology}-offload.json"
        path.write_text(json.dumps({**config, "zero_optimization": zero}))
        own.append(replace(job, overrides=(*job.overrides, f"deepspeed={path}")))
    run_world(world_2.root, 2, own)
    return world_2


@pytest.mark.skipif(shutil.which("c++") is None, reason="DeepSpeed compiles its CPU Adam with a C++ compiler")
@pytest.mark.distributed
@pytest.mark.timeout(COMPILE_SECONDS + 300)
@pytest.mark.parametrize(
    "name",
    ["zero3-offload", "replicated-1x2-offload", "pipeline-2x1-offload", "pipeline_zero3-2x1-offload"],
)
def test_losses_and_weights_are_those_of_torchs_adamw(offloaded: TinyRun, name: str) -> None:
    actual, expected = offloaded.run(f"{name}-2"), offloaded.run("adamw-2")
    for key in ("loss", "grad_norm"):
        assert relative([r[key] for r in metrics(actual)], [r[key] for r in metrics(expected)]) < 1e-4
    assert distance(trained(actual), trained(expected)) < 1e-4
    summary = json.loads(actual.training_summary.read_text())
    assert summary["frozen_unchanged"]
    holding = summary["optimizer_bytes_per_rank"]
    assert sum(holding) == pytest.approx(12 * summary["trained_parameters"], rel=0.02)
    if not name.startswith("pipeline"):
        assert holding == pytest.approx([sum(holding) / 2] * 2, rel=0.02)
