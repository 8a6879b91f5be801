#!/usr/bin/env python
"""Does a training go on as if nothing had happened, on other ranks and in another topology too, and what do saves cost?

Every place (topology and ranks) trains 20 steps and saves a checkpoint after step 8; from it every place goes on to
step 20. Losses and weights are compared with those of the training that was not interrupted. Gate noise, budget loss
and clipping are on. Then one session takes steps with and without saves in between.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import processor  # noqa: F401 - before DeepSpeed is imported
import torch
from faults import set_environment
from miniature import Miniature, Unexpected, make_miniature
from resume_ranks import BLOCK, COPY, TIMES
from support.compare import distance, metrics, relative
from support.tiny_run import TinyRun, make_tiny_run
from support.training_runs import ADAMW, NOISY, sets
from support.worlds import Job, run_world

from lander_ds.checkpoint import checkpoint
from lander_ds.common.run_directory import RunDirectory

SAVED_AT, STEPS = 8, 20
LIMITS = {"adamw": 1e-4, "sgd": 1e-5}
"""Relative difference of losses, where topology or ranks changed."""
OVERHEAD_LIMIT = 1.1
OPTIMIZERS = {
    "adamw": ADAMW,
    "sgd": (
        *NOISY,
        *sets(train__optimizer="sgd", train__clip=0.2),
        "train.lr={general: 1.0, specific: 2.0, gates: 2.0}",
    ),
}
WIDTH, NEURONS, BATCH_TOKENS = 256, 1024, 512
"""Of the model and the batches of the second part: steps take some 0.1 s or more, a checkpoint has 15 MB."""
WORLD_SECONDS = 900.0


@dataclass(frozen=True)
class Placement:
    """Where a training runs."""

    topology: str
    stages: int
    data_ranks: int

    @property
    def name(self) -> str:
        """As it is written in figures."""
        if self.stages == 1:
            return f"{self.topology} x{self.data_ranks}"
        return f"{self.topology} {self.stages}x{self.data_ranks}"

    @property
    def ranks(self) -> int:
        """Number of processes."""
        return self.stages * self.data_ranks

    @property
    def overrides(self) -> tuple[str, ...]:
        """Of the recipe."""
        if self.topology == "zero3":
            return ()
        json_name = f"deepspeed=$root/{self.topology}.json"
        return (f"topology={self.topology}", f"pipeline_stages={self.stages}", json_name)


PLACES = {
    placement.name: placement
    for placement in (
        Placement("zero3", 1, 1),
        Placement("zero3", 1, 2),
        Placement("zero3", 1, 4),
        Placement("replicated", 1, 2),
        Placement("pipeline", 2, 1),
        Placement("pipeline", 2, 2),
        Placement("pipeline_zero3", 2, 2),
    )
}


def job(name: str, placement: Placement, optimizer: str, call: str) -> Job:
    """A training in a place."""
    options = (f"train.steps={STEPS}", f"train.save_every={SAVED_AT}")
    return Job(name, (*OPTIMIZERS[optimizer], *options, *placement.overrides), call)


def source(placement: Placement, optimizer: str) -> str:
    """Name of the training that is not interrupted."""
    return f"whole-{placement.name.replace(' ', '-')}-{optimizer}"


def directory(built: TinyRun, name: str, placement: Placement) -> RunDirectory:
    """Of a job in a place."""
    return built.run(f"{name}-{placement.ranks}")


def matrix(built: TinyRun, places: Sequence[Placement], optimizers: Sequence[str]) -> list[dict[str, Any]]:
    """Train everywhere, resume everywhere, compare."""
    for placement in places:
        say(f"training in {placement.name}")
        jobs = [
            job(source(placement, name), placement, name, "lander_ds.stages.train:run") for name in optimizers
        ]
        run_world(built.root, placement.ranks, jobs, timeout=WORLD_SECONDS)
    cases = []
    for placement in places:
        say(f"resuming in {placement.name}")
        todo = [(saved, name, f"{source(saved, name)}-{saved.ranks}-in-{placement.name.replace(' ', '-')}")
                for saved in places for name in optimizers]  # fmt: skip
        for saved, name, title in todo:
            begin(directory(built, source(saved, name), saved), directory(built, title, placement))
        run_world(
            built.root,
            placement.ranks,
            [job(title, placement, name, "resume_ranks:go_on") for _, name, title in todo],
            timeout=WORLD_SECONDS,
        )
        for saved, name, title in todo:
            whole, resumed = directory(built, source(saved, name), saved), directory(built, title, placement)
            cases.append(
                {"saved": saved.name, "resumed": placement.name, "optimizer": name, **compare(resumed, whole)}
            )
            shutil.rmtree(resumed.path)
    return cases


def begin(whole: RunDirectory, resumed: RunDirectory) -> None:
    """Give a run directory the checkpoint of another training."""
    shutil.copytree(whole.checkpoints / f"step-{SAVED_AT}", resumed.checkpoints / f"step-{SAVED_AT}")
    shutil.copy(whole.metrics, resumed.metrics)


def compare(resumed: RunDirectory, whole: RunDirectory) -> dict[str, Any]:
    """The steps after the checkpoint, and the checkpoint at the end, of two trainings."""
    losses = [[record["loss"] for record in metrics(run)] for run in (resumed, whole)]
    if [len(actual) for actual in losses] != [STEPS, STEPS]:
        raise Unexpected(f"{resumed.path}: {len(losses[0])} steps in metrics.jsonl, not {STEPS}")
    actual, expected = (checkpoint.newest(run.checkpoints) for run in (resumed, whole))
    bitwise = losses[0] == losses[1] and all(
        equal(one, other)
        for one, other in (
            (actual.trained(), expected.trained()),
            (actual.optimizer(), expected.optimizer()),
        )
    )
    return {
        "max_rel_loss_diff": relative(losses[0][SAVED_AT:], losses[1][SAVED_AT:]),
        "max_rel_weight_diff": distance(actual.trained(), expected.trained()),
        "bitwise": bitwise,
    }


def equal(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    """Whether all tensors are bitwise equal."""
    return set(actual) == set(expected) and all(
        torch.equal(actual[name], expected[name]) for name in expected
    )


def overhead(built: Miniature, rounds: int) -> dict[str, Any]:
    """What a save every ten steps costs: time of ten steps with it over time without, in the median of the rounds."""
    say("timing saves")
    options = (*ADAMW, f"train.valid_every={rounds}", f"train.batch_tokens={BATCH_TOKENS}")
    run = built.run("timed-2")
    run_world(built.root, 2, [Job("timed", options, "resume_ranks:time_saves")], timeout=WORLD_SECONDS)
    times: dict[str, list[float]] = json.loads((run.path / TIMES).read_text())

    def ratio(kind: str) -> float:
        # Within a round: what else the machine does changes slowly.
        return statistics.median(a / b for a, b in zip(times[kind], times["none"], strict=True))

    saved = checkpoint.newest(run.path / "background" / "checkpoints")
    return {
        "save_overhead": ratio("background"),
        "save_overhead_foreground": ratio("foreground"),
        "step_seconds": statistics.median(times["none"]) / BLOCK,
        "copy_seconds": statistics.median(times[COPY]),
        "block_seconds": times,
        "checkpoint_bytes": sum(file["bytes"] for file in saved.state["files"].values()),
        "rounds": rounds,
    }


def breaches(result: Mapping[str, Any]) -> list[str]:
    """Limits that are broken."""
    actual = []
    for case in result["cases"]:
        what = f"{case['optimizer']}, saved in {case['saved']}, resumed in {case['resumed']}"
        if case["max_rel_loss_diff"] > LIMITS[case["optimizer"]]:
            actual.append(f"{what}: losses differ by {case['max_rel_loss_diff']:.1e}")
        if case["saved"] == case["resumed"] and not case["bitwise"]:
            actual.append(f"{what}: not bitwise equal")
    if result.get("save_overhead", 0.0) > OVERHEAD_LIMIT:
        actual.append(
            f"saving every {BLOCK} steps takes {result['save_overhead']:.2f} times as long as not saving"
        )
    return actual


def say(text: str) -> None:
    """Progress, on standard error."""
    print(f"resume: {text}", file=sys.stderr, flush=True)


def table(result: Mapping[str, Any]) -> str:
    """The result for a person."""
    lines = []
    for optimizer in dict.fromkeys(case["optimizer"] for case in result["cases"]):
        cases = {(c["saved"], c["resumed"]): c for c in result["cases"] if c["optimizer"] == optimizer}
        names = list(dict.fromkeys(saved for saved, _ in cases))
        lines.append(f"{optimizer}: largest relative difference of a loss; = is bitwise equal")
        lines.append("".join(f"{text:>20}" for text in ("saved \\ resumed", *names)))
        for saved in names:
            row = [cases[saved, resumed] for resumed in names]
            cells = ["=" if case["bitwise"] else f"{case['max_rel_loss_diff']:.1e}" for case in row]
            lines.append("".join(f"{text:>20}" for text in (saved, *cells)))
        lines.append("")
    lines += [f"{key:<28}{value:.4g}" for key, value in result.items() if not isinstance(value, list | dict)]
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--places", default=",".join(PLACES), help="with commas (%(default)s)")
    add("--optimizers", default=",".join(OPTIMIZERS), help="with commas (%(default)s)")
    add("--rounds", default=12, type=int, help="of timed blocks of ten steps; 0: no timing (%(default)s)")
    add("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    for name, known in (("places", PLACES), ("optimizers", OPTIMIZERS)):
        chosen = list(filter(None, getattr(options, name).split(",")))
        if unknown := set(chosen) - set(known):
            parser.error(f"--{name}: unknown {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        setattr(options, name, chosen)
    if options.rounds < 0:
        parser.error("--rounds must not be negative")
    return options


def main() -> int:
    """Run; returns the exit code: 1 when a limit is broken."""
    options = parse()
    set_environment()
    # So that ranks and directories do not outlive it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    result: dict[str, Any] = {"cases": []}
    with tempfile.TemporaryDirectory(prefix="lander-resume-") as root:
        try:
            (Path(root) / "small").mkdir()
            built = make_tiny_run(Path(root) / "small")
            result["cases"] = matrix(built, [PLACES[name] for name in options.places], options.optimizers)
            if options.rounds:
                result |= overhead(make_miniature(Path(root) / "large", WIDTH, NEURONS), options.rounds)
        except (Unexpected, RuntimeError) as error:
            say(f"error: {error}")
            return 1
    broken = breaches(result)
    for text in broken:
        say(f"LIMIT BROKEN: {text}")
    print(json.dumps(result, indent=2) if options.json else table(result))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
