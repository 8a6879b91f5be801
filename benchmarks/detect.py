#!/usr/bin/env python
"""What does detection cost, against a forward and backward pass of full fine-tuning, and what do its hooks cost?

One process takes turns, micro-batch by micro-batch, with three systems on the same tokens: `detect` is the pass of stage
detect, `bare` the same without the hooks that collect statistics, `full` the model as it is, with the gradients of all
weights and logits at the same positions. No optimizer steps. docs/benchmarks.md says how to read the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import processor  # noqa: F401 - before DeepSpeed is imported
import torch
from figures import circumstances
from step import WARM_UP, set_environment
from systems import IGNORED, REPLICATED_JSON, recipe_of
from transformers import AutoModelForCausalLM
from workload import Workload

from lander_ds.common.errors import LanderError
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.recipe import ModelConfig
from lander_ds.data.batching.micro_batches import packed
from lander_ds.data.batching.packing import PackedBatch
from lander_ds.distributed import process_group
from lander_ds.distributed.parallel_dims import parallel_dims
from lander_ds.distributed.start import Start
from lander_ds.method.collector import StatisticsCollector
from lander_ds.models.loading import build, hf_config
from lander_ds.models.translation_model import BatchTotals
from lander_ds.training.spreading import spread

ROOT = Path(__file__).parents[1]
GOALS = {"ratio_full": 0.70, "hook_share": 0.05}

Pass = Callable[[PackedBatch], None]


def passes(workload: Workload, directory: Path) -> dict[str, Pass]:
    """A forward and backward pass of every system, by name."""
    # Not sharded, because `full` is not either.
    recipe = replace(recipe_of(workload, directory), topology="replicated")
    start, dims = Start(recipe, RunDirectory(recipe.run_dir)), parallel_dims(recipe)
    model, family = build(recipe.model)
    model.requires_grad_(False)
    projections = family.down_projections(model)
    config = start.deepspeed_config(dims.data_parallel_ranks, micro_batches=1)
    engine = spread(recipe, config, dims, model, family, detect=True)
    totals = BatchTotals(target_tokens=1, examples=1)
    device, count = torch.device("cpu"), len(projections)
    collector = StatisticsCollector(dict(enumerate(projections)), count, len(recipe.data.pairs), device)

    def detect(batch: PackedBatch) -> None:
        with collector:
            engine.model.announce = lambda one: collector.set_pairs(one.pair_ids)
            engine.differentiate([batch], totals)

    def bare(batch: PackedBatch) -> None:
        engine.model.announce = None
        engine.differentiate([batch], totals)

    whole = AutoModelForCausalLM.from_pretrained(workload.model, dtype=getattr(torch, workload.dtype)).eval()

    def full(batch: PackedBatch) -> None:
        ids = batch.input_ids.reshape(-1, workload.length)
        labels = ids.clone()
        labels[:, : workload.prompt] = IGNORED
        kept = torch.arange(workload.prompt - 1, workload.length - 1)
        targets = labels[:, workload.prompt :].contiguous()
        whole(input_ids=ids, labels=labels, shift_labels=targets, logits_to_keep=kept).loss.backward()
        whole.zero_grad(set_to_none=True)

    return {"detect": detect, "bare": bare, "full": full}


def measure(workload: Workload, systems: dict[str, Pass]) -> dict[str, list[float]]:
    """Processor seconds of every pass after the warm-up, by system."""
    splits = list(workload.data().split("train").values())
    plan = workload.plan(splits)
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    names = list(systems)
    for number in range(workload.steps):
        (batch,) = packed(plan.batch(number), splits, 0, 1, 1, torch.device("cpu"))
        first = number % len(names)
        for name in names[first:] + names[:first]:
            begun = time.process_time()
            systems[name](batch)
            seconds[name].append(time.process_time() - begun)
    return {name: values[WARM_UP:] for name, values in seconds.items()}


def figures(seconds: dict[str, list[float]]) -> dict[str, float]:
    """`ratio_full`: detection over full. `hook_share`: what the hooks add to the pass without them."""
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "ratio_full": round(median["detect"] / median["full"], 4),
        "hook_share": round(median["detect"] / median["bare"] - 1, 4),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--model", default=ROOT / "models" / "gemma3-270m", type=Path, help="HF model directory (%(default)s)"
    )
    add("--tokens", default=1024, type=int, help="tokens of a micro-batch (%(default)s)")
    add("--length", default=64, type=int, help="tokens of an example, half prompt, half target (%(default)s)")
    add(
        "--rounds", default=7, type=int, help=f"measured passes, after {WARM_UP} for warming up (%(default)s)"
    )
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="precision (%(default)s)")
    add("--json", action="store_true", help="print JSON instead of lines")
    options = parser.parse_args(arguments)
    threads, load = set_environment(1), os.getloadavg()[0]
    try:
        if options.rounds < 1 or options.length < 2 or options.tokens < 1 or options.tokens % options.length:
            raise ValueError("--tokens must be a multiple of --length (at least 2), --rounds at least 1")
        vocabulary = hf_config(ModelConfig(str(options.model)))[0].vocab_size
    except (LanderError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    workload = Workload(
        *(str(options.model), str(REPLICATED_JSON), options.dtype, 1, options.tokens, options.length, ()),
        vocabulary=vocabulary,
        steps=WARM_UP + options.rounds,
    )
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(prefix="lander-detect-") as directory:
        process_group.start()
        seconds = measure(workload, passes(workload, Path(directory)))
        process_group.stop()
    actual = {
        **figures(seconds),
        "processor_seconds": {name: [round(v, 4) for v in values] for name, values in seconds.items()},
        "model": str(options.model),
        "tokens": options.tokens,
        "dtype": options.dtype,
        **circumstances(threads, load),
    }
    if options.json:
        print(json.dumps(actual, indent=2))
    else:
        for name, goal in GOALS.items():
            print(f"{name} {actual[name]:.3f} (goal: at most {goal:.2f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
