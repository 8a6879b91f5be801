#!/usr/bin/env python
"""Do all topologies train and detect the same, and does every rank hold its part and no more?

Tiny random models of several families are trained for 20 steps on one rank with zero3 and in every other topology,
through the real launcher and the real stages. docs/benchmarks.md says how to read the figures. The exit code is 1 when
a limit is broken.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from figures import processor
from parity_cases import (
    CLIP,
    FAMILIES,
    GRIDS,
    LOAD_GRIDS,
    QUICK_GRIDS,
    REFERENCE,
    STEPS,
    TRAINED_LAYERS,
    Job,
    Workspace,
    elements_per_part,
    expected_elements,
    jobs_of,
)

from lander_ds.checkpoint import checkpoint
from lander_ds.common.run_directory import RunDirectory, versions
from lander_ds.config.deepspeed_topology import ZERO_STAGE
from lander_ds.distributed.process_group import free_port
from lander_ds.method.awareness import STATISTICS, Awareness

RANK_PROGRAM = Path(__file__).with_name("parity_ranks.py")
ROOT = Path(__file__).parents[1]
FLOAT = 4
LARGE = "large"
"""Name of the larger model whose loading is watched."""
LARGE_LAYERS, LARGE_WIDTH, QUICK_WIDTH = 16, 1024, 512
"""300 million parameters, 1.2 GB; with `--quick` a quarter of that."""

LIMITS = {"sgd": 1e-5, "adamw": 1e-4, "awareness": 1e-5, "bytes": 0.05, "load_slack": 0.05}
"""Largest relative difference of losses and trained weights by optimizer, of awareness, and of bytes from what is
expected; and by how much of the larger model's share the peak of loading may exceed held bytes plus one unit."""

LAST_LINES = 40


class GroupFailed(Exception):
    """The ranks of a process group have not done their jobs."""


def launch(workspace: Workspace, jobs: list[Job], timeout: float) -> None:
    """Run jobs of the same number of ranks in one process group.

    Raises:
        GroupFailed: with the last lines that the ranks have said.
    """
    ranks = jobs[0].grid.ranks
    plan = workspace.path / f"jobs-{ranks}.json"
    plan.write_text(json.dumps([job.to_json() for job in jobs]))
    log = workspace.path / f"ranks-{ranks}.log"
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks)]
    command += ["--master_port", str(free_port()), str(RANK_PROGRAM), str(workspace.path), str(plan)]
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, env=environment(), start_new_session=True
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code != 0:
        what = f"did not end in {timeout:.0f} s" if code is None else f"failed with code {code}"
        last = "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])
        raise GroupFailed(f"{ranks} ranks: {what}\n{last}")


def environment() -> dict[str, str]:
    """Of the ranks: the processor, one thread each, no network, and memory that the allocator gives back."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "131072",
    }


def relative(actual: list[float], expected: list[float]) -> float:
    """Largest relative difference of two series; infinite if their lengths differ or a value is not a number."""
    if len(actual) != len(expected):
        return math.inf
    differences = [abs(a - b) / max(abs(b), 1e-12) for a, b in zip(actual, expected, strict=True)]
    return math.inf if any(map(math.isnan, differences)) else max(differences)


def steps_of(run: RunDirectory) -> list[dict[str, Any]]:
    """Records of the optimizer steps."""
    records = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [record for record in records if "loss" in record]


def compare_training(run: RunDirectory, reference: RunDirectory) -> dict[str, Any]:
    """Losses of all steps and pairs, and trained weights: the norm of the difference over the norm."""
    actual, expected = steps_of(run), steps_of(reference)
    worst = relative([r["loss"] for r in actual], [r["loss"] for r in expected])
    for one, other in zip(actual, expected, strict=False):
        pairs = list(other["loss_per_pair"])
        values = [one["loss_per_pair"].get(pair, math.nan) for pair in pairs]
        worst = max(worst, relative(values, [other["loss_per_pair"][pair] for pair in pairs]))
    ours, theirs = (checkpoint.newest(r.checkpoints).trained() for r in (run, reference))
    if ours.keys() != theirs.keys():
        difference = math.inf
    else:
        difference = _norm([ours[name].double() - theirs[name].double() for name in theirs])
        difference /= _norm([value.double() for value in theirs.values()])
    return {
        "steps": len(actual),
        "first_loss": actual[0]["loss"],
        "last_loss": actual[-1]["loss"],
        "least_grad_norm": min(record["grad_norm"] for record in expected),
        "max_rel_loss_diff": worst,
        "max_rel_grad_norm_diff": relative(
            [r["grad_norm"] for r in actual], [r["grad_norm"] for r in expected]
        ),
        "max_rel_weight_diff": difference,
    }


def _norm(tensors: list[torch.Tensor]) -> float:
    return float(torch.stack([tensor.square().sum() for tensor in tensors]).sum().sqrt())


def compare_awareness(run: RunDirectory, reference: RunDirectory) -> float:
    """Largest difference of any statistic of any neuron, over the sum of absolute values that it is a sum of."""
    actual, expected = Awareness.load(run.awareness), Awareness.load(reference.awareness)
    worst = torch.zeros((), dtype=torch.float64)
    for statistic in STATISTICS:
        one, other = getattr(actual, statistic), getattr(expected, statistic)
        scale = expected.sum_abs_h if statistic == "sum_h" else other.abs()
        # torch's maximum of a NaN and a number is NaN, which keeps to no limit.
        worst = torch.maximum(worst, ((one - other).abs() / scale.clamp_min(1e-12)).max())
    return float(worst)


def facts_of(workspace: Workspace, job: Job) -> list[dict[str, Any]]:
    """What every rank has noted of a `hold` or `load` job."""
    directory = workspace.run(job).path
    return [json.loads((directory / f"rank-{rank}.json").read_text()) for rank in range(job.grid.ranks)]


def shards(job: Job) -> int:
    """Over how many ranks a weight is sharded."""
    return job.grid.data_ranks if ZERO_STAGE[job.grid.topology] == 3 else 1


def results(workspace: Workspace, jobs: list[Job], large_layers: int) -> dict[str, Any]:
    """Every figure, and whether it keeps to its limit."""
    awareness = {
        (job.model, job.grid): compare_awareness(workspace.run(job), workspace.run(job.reference))
        for job in jobs
        if job.what == "detect"
    }
    cases = []
    for job in jobs:
        if job.what != "train" or job.grid == REFERENCE:
            continue
        figures = compare_training(workspace.run(job), workspace.run(job.reference))
        aware = awareness[job.model, job.grid]
        limit = LIMITS[job.optimizer]
        sound = (
            figures["max_rel_loss_diff"] < limit
            and figures["max_rel_weight_diff"] < limit
            and aware < LIMITS["awareness"]
            and figures["steps"] == job.steps
            and (not job.clip or figures["least_grad_norm"] > job.clip)
        )
        grid = job.grid
        cases.append(
            {
                "name": job.name,
                "family": job.model,
                "topology": grid.topology,
                "ranks": grid.ranks,
                "stages": grid.stages,
                "optimizer": job.optimizer,
                "clip": job.clip,
                **figures,
                "max_rel_awareness_diff": aware,
                "limit": limit,
                "ok": sound,
            }
        )
    holding, peaks = [], []
    for job in jobs:
        if job.what not in ("hold", "load"):
            continue
        middle = (large_layers // 2 - 1, large_layers // 2)
        gated = TRAINED_LAYERS if job.what == "hold" else middle
        for rank, facts in enumerate(facts_of(workspace, job)):
            start, stop = facts["span"]
            expected = (
                FLOAT * expected_elements(workspace.model(job.model), (start, stop), gated) / shards(job)
            )
            entry = {
                "case": f"{job.model}, {job.grid.name}",
                "rank": rank,
                "layers": [start, stop],
                "measured": facts["weights"],
                "expected": round(expected),
                "ok": abs(facts["weights"] / expected - 1) < LIMITS["bytes"],
            }
            holding.append(entry)
            if job.what == "load":
                before, layers, after = elements_per_part(workspace.model(job.model))
                parts = [*layers[start:stop], *([before] if start == 0 else [])]
                unit = FLOAT * max(parts + ([after] if stop == len(layers) else []))
                own = facts["weights"] + facts["gradients"] + facts["optimizer"]
                slack = LIMITS["load_slack"] * FLOAT * (before + sum(layers) + after)
                peaks.append(
                    {
                        "case": entry["case"],
                        "rank": rank,
                        "peak": facts["peak"],
                        "held": own,
                        "largest_unit": unit,
                        "ok": facts["peak"] < own + unit + slack,
                    }
                )
    everything = [*cases, *holding, *peaks]
    return {
        "ok": bool(cases) and all(entry["ok"] for entry in everything),
        "limits": LIMITS,
        "cases": cases,
        "weight_bytes": holding,
        "load_peaks": peaks,
    }


def table(actual: dict[str, Any]) -> str:
    """The result for a person: the worst case of every topology and optimizer, then the bytes."""
    lines = [
        f"{actual['steps']} steps; families {', '.join(actual['families'])}; clipping off and at {CLIP:g}",
        "",
    ]
    lines.append(f"{'topology':<34}{'optimizer':<11}{'loss':>10}{'weights':>10}{'awareness':>11}{'limit':>9}")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for case in actual["cases"]:
        groups.setdefault((case["name"].split(", ")[1], case["optimizer"]), []).append(case)
    for (grid, optimizer), cases in groups.items():
        worst = [
            max(case[key] for case in cases)
            for key in ("max_rel_loss_diff", "max_rel_weight_diff", "max_rel_awareness_diff")
        ]
        figures = f"{worst[0]:>10.1e}{worst[1]:>10.1e}{worst[2]:>11.1e}{cases[0]['limit']:>9.0e}"
        lines.append(f"{grid:<34}{optimizer:<11}{figures}{_mark(all(case['ok'] for case in cases))}")
    lines += ["", f"{'bytes of weights':<50}{'rank':>5}{'layers':>9}{'measured':>15}{'expected':>15}"]
    for entry in actual["weight_bytes"]:
        layers = "{}-{}".format(entry["layers"][0], entry["layers"][1] - 1)
        figures = f"{entry['rank']:>5}{layers:>9}{entry['measured']:>15,}{entry['expected']:>15,}"
        lines.append(f"{entry['case']:<50}{figures}{_mark(entry['ok'])}")
    lines += ["", f"{'peak while loading (MB)':<50}{'rank':>5}{'peak':>9}{'held':>9}{'largest unit':>14}"]
    for entry in actual["load_peaks"]:
        figures = "".join(
            f"{entry[key] / 1e6:>{width},.0f}"
            for key, width in (("peak", 9), ("held", 9), ("largest_unit", 14))
        )
        lines.append(f"{entry['case']:<50}{entry['rank']:>5}{figures}{_mark(entry['ok'])}")
    lines += ["", f"{'all limits kept' if actual['ok'] else 'A LIMIT IS BROKEN'}; {actual['seconds']:.0f} s"]
    return "\n".join(lines)


def _mark(sound: bool) -> str:
    return "" if sound else "  broken"


def say(text: str) -> None:
    """Progress, on standard error."""
    print(f"parity: {text}", file=sys.stderr, flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--json", action="store_true", help="print JSON instead of a table")
    add(
        "--families", default="gemma3,bloom,qwen2", help=f"with commas, of {','.join(FAMILIES)} (%(default)s)"
    )
    add(
        "--quick",
        action="store_true",
        help="one family, two ranks, clipping on, and a smaller model to watch loading",
    )
    add("--steps", default=STEPS, type=int, help="of every training (%(default)s)")
    add(
        "--timeout",
        default=60.0,
        type=float,
        help="seconds per job, in the mean of all jobs of one number of ranks (%(default)s)",
    )
    add("--keep", type=Path, metavar="DIR", help="work in DIR, which must not exist, and keep it")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Prepare, run and compare everything.

    Raises:
        GroupFailed: ranks failed.
    """
    started = time.monotonic()
    families = tuple(dict.fromkeys(options.families.split(",")))[: 1 if options.quick else None]
    grids = QUICK_GRIDS if options.quick else GRIDS
    jobs = list(
        jobs_of(families, grids, clips=(CLIP,) if options.quick else (0.0, CLIP), steps=options.steps)
    )
    loads = QUICK_GRIDS if options.quick else LOAD_GRIDS
    jobs += [Job("load", LARGE, grid) for grid in loads]
    workspace = Workspace(path)
    say("writing models and corpora")
    with redirect_stdout(sys.stderr):
        workspace.prepare(families)
        workspace.prepare_large(LARGE, LARGE_LAYERS, QUICK_WIDTH if options.quick else LARGE_WIDTH)
    for ranks in sorted({job.grid.ranks for job in jobs}):
        own = [job for job in jobs if job.grid.ranks == ranks]
        begun = time.monotonic()
        launch(workspace, own, options.timeout * len(own))
        say(f"{len(own)} jobs on {ranks} ranks took {time.monotonic() - begun:.0f} s")
    return {
        **results(workspace, jobs, LARGE_LAYERS),
        "families": list(families),
        "steps": options.steps,
        "seconds": round(time.monotonic() - started, 1),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "versions": versions()},
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
    }


def main() -> int:
    """Run; returns the exit code."""
    options = parse()
    if unknown := set(options.families.split(",")) - set(FAMILIES):
        say(f"error: --families: unknown {', '.join(sorted(unknown))}; there are {', '.join(FAMILIES)}")
        return 2
    if options.keep is not None and options.keep.exists():
        say(f"error: --keep: {options.keep} exists already; remove it or name another directory")
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if options.keep is not None:
            options.keep.mkdir(parents=True)
            actual = run(options, options.keep.resolve())
        else:
            with tempfile.TemporaryDirectory(prefix="lander-parity-") as directory:
                actual = run(options, Path(directory))
    except GroupFailed as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    print(json.dumps(actual, indent=2) if options.json else table(actual))
    return 0 if actual["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
