#!/usr/bin/env python
"""How do step cost and memory grow with ranks, depth, width, vocabulary and language pairs, and does the planner know?

Small random models are trained in every size, each axis in a sitting of its own together with the base case, with which
its cases take turns step by step. What is measured and what the planner counts are both compared with the base case,
because the planner's seconds would need a description of this machine. docs/benchmarks.md says how to read the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import processor  # noqa: F401 - before DeepSpeed is imported
import torch
from figures import Measured, circumstances
from step import WARM_UP, say, set_environment, sit
from systems import REPLICATED_JSON, recipe_of
from transformers import LlamaConfig, LlamaForCausalLM
from turns import SystemFailed
from workload import Workload, chosen_layers

from lander_ds.cluster.planning import workload as planned
from lander_ds.cluster.planning.activations import trace
from lander_ds.cluster.planning.anatomy import anatomy
from lander_ds.cluster.planning.memory import rank_memory
from lander_ds.cluster.planning.plan import sharding_of
from lander_ds.cluster.planning.work import operations

GOAL = 1.15
"""Of `pairs_ratio`."""
DTYPE = "float32"
TARGET_SHARE = 0.5


@dataclass(frozen=True)
class Size:
    """One case."""

    ranks: int = 1
    """Each has as many tokens."""
    depth: int = 4
    """Decoder layers, of which the middle four are trained."""
    width: int = 512
    """Hidden width; the FFN has 2.75 times as many neurons."""
    vocabulary: int = 4096
    pairs: int = 2


AXES: dict[str, tuple[int, ...]] = {
    "ranks": (2, 4),
    "depth": (8, 16),
    "width": (1024,),
    "vocabulary": (16384,),
    "pairs": (8, 32),
}
"""Field of `Size` -> its values beside that of the base case."""


def sizes(axis: str, base: Size) -> dict[str, Size]:
    """The cases of an axis by name, the base case first."""
    values = (getattr(base, axis), *AXES[axis])
    return {f"{axis}={value}": replace(base, **{axis: value}) for value in values}


def workload_of(size: Size, options: argparse.Namespace, directory: Path) -> Workload:
    """What a case trains; its model is written into the directory."""
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.width * 11 // 4,
        num_hidden_layers=size.depth,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=options.length,
        tie_word_embeddings=True,
    )
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(directory)
    return Workload(
        model=str(directory),
        deepspeed=str(options.deepspeed),
        dtype=DTYPE,
        ranks=size.ranks,
        tokens=options.tokens,
        length=options.length,
        layers=chosen_layers("middle", size.depth),
        vocabulary=size.vocabulary,
        steps=WARM_UP + options.steps,
        pairs=tuple(f"en-{chr(97 + number // 26)}{chr(97 + number % 26)}" for number in range(size.pairs)),
    )


def predicted(system: str, workload: Workload, directory: Path) -> dict[str, float]:
    """What the planner counts: operations of a step on all ranks, bytes of one rank.

    Args:
        system: `lander` or `replicated`.
        workload: what was trained.
        directory: in which it was; the selection lies there.
    """
    recipe = recipe_of(workload, directory)
    if system == "replicated":
        recipe = replace(recipe, topology="replicated", deepspeed=str(REPLICATED_JSON))
    model, corpora = anatomy(recipe), planned.Workload(workload.length, TARGET_SHARE)
    batch, count = planned.micro_batch(recipe, corpora, workload.ranks)
    sharding = sharding_of(recipe, 1, [workload.ranks], count)
    kept = trace(recipe, batch, sharding.sharded, fused=False)
    activations = kept.kept(0, model.layers, True, model.first_trained, recompute=False)
    memory = rank_memory(model, model.whole, sharding, batch.targets, activations)
    return {
        "step": operations(model, model.whole, batch).total * count * workload.ranks,
        "memory": memory.on_device,
    }


def measure(axis: str, base: Size, options: argparse.Namespace, directory: Path) -> list[dict[str, Any]]:
    """The cases of an axis, measured in turns, beside what was predicted.

    Raises:
        SystemFailed: a rank has failed.
    """
    workloads = {
        name: workload_of(size, options, directory / f"{name}-model")
        for name, size in sizes(axis, base).items()
    }
    taken = sit({name: (options.system, workload) for name, workload in workloads.items()}, directory)
    plans = {
        name: predicted(options.system, workload, directory / name) for name, workload in workloads.items()
    }
    return cases(taken, plans)


def cases(measured: Mapping[str, Measured], plans: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """Every case against the first: `step` as a ratio, of processor time or of operations; `memory` in bytes beyond the
    first, of the rank with most, because the libraries have the largest part of it."""
    first, first_plan = next(iter(measured.values())), next(iter(plans.values()))
    return [
        {
            "name": name,
            "measured": {
                "step": round(own.processor_median / first.processor_median, 3),
                "memory": own.peak_bytes - first.peak_bytes,
            },
            "predicted": {
                "step": round(plans[name]["step"] / first_plan["step"], 3),
                "memory": plans[name]["memory"] - first_plan["memory"],
            },
            "processor_seconds": [round(step.processor_seconds, 4) for step in own.times],
            "peak_memory_bytes": own.peak_bytes,
        }
        for name, own in measured.items()
    ]


def table(actual: Mapping[str, Any]) -> str:
    """The result for a person."""
    lines = [f"{'case':<20}{'step':>8}{'planned':>9}{'MB more':>10}{'planned':>9}{'cpu s':>9}"]
    for case in actual["cases"]:
        own, plan = case["measured"], case["predicted"]
        seconds = sorted(case["processor_seconds"])[len(case["processor_seconds"]) // 2]
        lines.append(
            f"{case['name']:<20}{own['step']:>8.2f}{plan['step']:>9.2f}{own['memory'] / 1e6:>10.0f}"
            f"{plan['memory'] / 1e6:>9.0f}{seconds:>9.3f}"
        )
    if "pairs_ratio" in actual:
        lines.append(f"pairs_ratio {actual['pairs_ratio']:.3f} (goal: at most {GOAL})")
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--axes", nargs="+", default=list(AXES), choices=list(AXES), help="what grows (default: all)")
    add(
        "--system",
        default="lander",
        choices=("lander", "replicated"),
        help="zero3 or replicated (%(default)s)",
    )
    add("--tokens", default=512, type=int, help="tokens per rank and step (%(default)s)")
    add("--length", default=16, type=int, help="tokens of an example, half prompt, half target (%(default)s)")
    add("--width", default=Size.width, type=int, help="hidden width of the base case (%(default)s)")
    add("--steps", default=4, type=int, help=f"measured steps, after {WARM_UP} for warming up (%(default)s)")
    add("--deepspeed", default=Path(__file__).parents[1] / "ds_configs" / "270m" / "zero3.json", type=Path)
    add("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args(arguments)


def main() -> int:
    """Run; returns the exit code."""
    options = parse()
    if min(options.tokens, options.steps) < 1 or options.length < 2 or options.tokens % options.length:
        say("error: --tokens must be a multiple of --length (at least 2), --steps at least 1")
        return 2
    if options.width < 8 or options.width % 8:
        say("error: --width must be a multiple of 8")
        return 2
    threads, load = set_environment(max(AXES["ranks"])), os.getloadavg()[0]
    # So that the rank processes are stopped then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    every: list[dict[str, Any]] = []
    try:
        with tempfile.TemporaryDirectory(prefix="lander-scale-") as name:
            for axis in options.axes:
                directory = Path(name) / axis
                directory.mkdir()
                every += measure(axis, Size(width=options.width), options, directory)
    except SystemFailed as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    actual: dict[str, Any] = {"cases": every}
    if "pairs" in options.axes:
        actual["pairs_ratio"] = next(
            case["measured"]["step"] for case in every if case["name"] == f"pairs={AXES['pairs'][-1]}"
        )
    actual |= {"system": options.system, "tokens": options.tokens, "length": options.length, "dtype": DTYPE}
    actual |= circumstances(threads, load)
    print(json.dumps(actual, indent=2) if options.json else table(actual))
    return 0


if __name__ == "__main__":
    sys.exit(main())
