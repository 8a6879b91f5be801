#!/usr/bin/env python
"""How long does a training step take, and how much memory: this trainer against full fine-tuning and LoRA.

All systems run in one go on the same tokens, ranks and precision, and take turns step by step, so that whatever else
the machine does hits all of them alike. docs/benchmarks.md says how to read the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import processor  # noqa: F401 - before DeepSpeed is imported
from figures import Measured, Sitting, result, table
from systems import OTHER_TRAINERS, SYSTEMS, work
from turns import Group, StepTime, SystemFailed
from workload import Workload, chosen_layers

from lander_ds.common.errors import LanderError
from lander_ds.config.deepspeed_json import load_deepspeed_json
from lander_ds.config.recipe import ModelConfig
from lander_ds.models.loading import hf_config

ROOT = Path(__file__).parents[1]
WARM_UP = 2
"""Steps before the measured ones: in the first, DeepSpeed records the order of modules and buffers are made."""

OTHERS = [name for name in SYSTEMS if name != "lander"]
COMPARED = list(OTHER_TRAINERS)
"""Without being asked for others."""


def sit(jobs: Mapping[str, tuple[str, Workload]], logs: Path, profile: bool = False) -> Sitting:
    """Start systems one after the other, let them take turns to the end, and stop them.

    Every round starts with another one, so that each follows each.

    Args:
        jobs: name -> system and what it trains; the number of steps is the same in all.
        logs: gets a directory for each.
        profile: record the operators of the last step.
    """
    groups: list[Group] = []
    times: dict[str, list[StepTime]] = {name: [] for name in jobs}
    (steps,) = {workload.steps for _, workload in jobs.values()}
    try:
        for name, (system, workload) in jobs.items():
            say(f"starting {name}")
            directory = logs / name
            directory.mkdir()
            job = work(system, workload, directory)
            groups.append(Group(name, job, workload.ranks, steps, directory, profile))
            groups[-1].wait_until_ready()
        for number in range(steps):
            first = number % len(groups)
            for group in groups[first:] + groups[:first]:
                times[group.name].append(group.step())
            last = ", ".join(f"{name} {taken[-1].seconds:.2f} s" for name, taken in times.items())
            say(f"round {number + 1} of {steps}{' (warm-up)' if number < WARM_UP else ''}: {last}")
        return {group.name: Measured(times[group.name][WARM_UP:], group.facts()) for group in groups}
    finally:
        for group in groups:
            group.stop()


def say(text: str) -> None:
    """Progress, on standard error."""
    print(f"step: {text}", file=sys.stderr, flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--model", default=ROOT / "models" / "gemma3-270m", type=Path, help="HF model directory (%(default)s)"
    )
    add("--ranks", default=2, type=int, help="data-parallel ranks (%(default)s)")
    add("--tokens", default=512, type=int, help="tokens per rank and step (%(default)s)")
    add("--length", default=64, type=int, help="tokens of an example, half prompt, half target (%(default)s)")
    add("--steps", default=8, type=int, help=f"measured steps, after {WARM_UP} for warming up (%(default)s)")
    add(
        "--layers",
        default="middle",
        help="layers of lander: middle, last (4 each), or e.g. 0,3,10 (%(default)s)",
    )
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="precision (%(default)s)")
    add(
        "--deepspeed",
        default=ROOT / "ds_configs" / "270m" / "zero3.json",
        type=Path,
        help="DeepSpeed JSON of all",
    )
    add("--against", default=",".join(COMPARED), help=f"with commas, of {','.join(OTHERS)} (%(default)s)")
    add("--together", default=2, type=int, help="others in memory at the same time as lander (%(default)s)")
    add("--profile", choices=list(SYSTEMS), help="only this system: print where a step's time goes")
    add("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args(arguments)


def read_workload(options: argparse.Namespace) -> Workload:
    """The workload that the command line describes.

    Raises:
        LanderError, ValueError: it cannot be run.
    """
    for name in ("ranks", "tokens", "steps", "together"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1")
    if options.length < 2 or options.tokens % options.length:
        raise ValueError(
            f"--tokens ({options.tokens}) must be a multiple of --length ({options.length}, at least 2)"
        )
    if unknown := set(options.against.split(",")) - set(OTHERS):
        raise ValueError(f"--against: unknown {', '.join(sorted(unknown))}; there are {', '.join(OTHERS)}")
    load_deepspeed_json(options.deepspeed)
    config, _ = hf_config(ModelConfig(str(options.model)))
    layers = chosen_layers(options.layers, config.num_hidden_layers)
    return Workload(
        model=str(options.model),
        deepspeed=str(options.deepspeed),
        dtype=options.dtype,
        ranks=options.ranks,
        tokens=options.tokens,
        length=options.length,
        layers=layers,
        vocabulary=config.vocab_size,
        steps=WARM_UP + options.steps,
    )


def set_environment(ranks: int) -> int:
    """Set what rank processes inherit; returns their number of threads."""
    threads = int(
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // max(1, ranks))))
    )
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    # All ranks are on this machine, whatever its name resolves to.
    if Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # DeepSpeed starts ninja by name.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return threads


def main() -> int:
    """Run; returns the exit code."""
    options = parse()
    threads, load = set_environment(options.ranks), os.getloadavg()[0]
    try:
        workload = read_workload(options)
    except (LanderError, ValueError) as error:
        say(f"error: {error}")
        return 2
    # So that the rank processes are stopped then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    others = list(dict.fromkeys(options.against.split(",")))
    parts = [others[first : first + options.together] for first in range(0, len(others), options.together)]
    try:
        with tempfile.TemporaryDirectory(prefix="lander-step-") as logs:
            if options.profile:
                name = options.profile
                measured = sit({name: (name, workload)}, Path(logs), profile=True)[name]
                print(measured.facts[0].profile)
                return 0
            sittings = []
            for number, part in enumerate(parts):
                directory = Path(logs) / f"sitting-{number + 1}"
                directory.mkdir()
                sittings.append(sit({name: (name, workload) for name in ["lander", *part]}, directory))
    except SystemFailed as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    actual = result(sittings, workload, WARM_UP, threads, load)
    print(json.dumps(actual, indent=2) if options.json else table(actual))
    return 0


if __name__ == "__main__":
    sys.exit(main())
