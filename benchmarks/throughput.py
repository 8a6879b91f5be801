#!/usr/bin/env python
"""How many target tokens a second does a training learn from, from batch to optimizer step, on real sentences?

`lander` packs sentences of all lengths without padding; `lora` is transformers' Trainer with adapters of rank 16, which pads
a batch of sentences in random order to the longest. Both take turns step by step, with about as many tokens in a batch.
docs/benchmarks.md says how to read the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import processor  # noqa: F401 - before DeepSpeed is imported
from figures import Measured, circumstances
from step import WARM_UP, set_environment, sit
from turns import SystemFailed
from workload import PAIRS, Workload, chosen_layers

from lander_ds.common.errors import LanderError
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.recipe import Recipe
from lander_ds.config.schema.types import Split
from lander_ds.data.batching.packing import Example, pack
from lander_ds.data.batching.plan import cut
from lander_ds.data.prepared import PreparedData, PreparedSplit
from lander_ds.models.loading import hf_config
from lander_ds.preflight.recipe import load_checked
from lander_ds.stages import prepare

ROOT = Path(__file__).parents[1]
GOAL = 2.0


class TrainingData(PreparedData):
    """The training split of prepared data alone: no step is followed by a validation."""

    def __init__(self, whole: PreparedData) -> None:
        self.pairs, self._whole = whole.pairs, whole

    def content_hash(self, *splits: Split) -> str:
        """Of the examples of `splits`."""
        return self._whole.content_hash(*splits)

    def split(self, split: Split) -> dict[str, PreparedSplit]:
        """The training split of every pair; other splits are empty."""
        return self._whole.split(split) if split == "train" else {}


@dataclass(frozen=True, kw_only=True)
class RealWorkload(Workload):
    """Prepared sentences of real corpora. `length` is their mean length, rounded."""

    recipe: Recipe
    """What was prepared."""

    def data(self) -> PreparedData:
        """The corpora."""
        return TrainingData(PreparedData.load(RunDirectory(self.recipe.run_dir), self.recipe))

    def in_order(self) -> list[Example]:
        """Training examples of all pairs in a random order, as many as padded batches of sentences take."""
        splits = self.data().split("train")
        every = [(pair, index) for pair in PAIRS for index in range(len(splits[pair]))]
        order = np.random.default_rng(self.seed).permutation(len(every))
        chosen = []
        for number in order[: self.steps * self.ranks * self.examples]:
            pair, index = every[number]
            input_ids, prompt = splits[pair].tokens(index)
            chosen.append(Example(input_ids, prompt, PAIRS.index(pair), int(number)))
        return chosen

    def packed_targets_and_waste(self) -> tuple[int, float]:
        """Of the measured steps of `lander`: target tokens, and the share of computed tokens that are padding."""
        splits = list(self.data().split("train").values())
        plan = self.plan(splits)
        targets = tokens = computed = 0
        for number in range(WARM_UP, self.steps):
            batch = plan.batch(number)
            targets += batch.target_tokens
            tokens += int(batch.lengths.sum())
            for (positions,) in cut(batch, self.ranks, micro_batches=1):
                rows = [splits[batch.pair_ids[i]].tokens(int(batch.indices[i])) for i in positions]
                computed += pack([Example(ids, prompt, 0, 0) for ids, prompt in rows]).input_ids.numel()
        return targets, 1 - tokens / computed

    def padded_targets_and_waste(self) -> tuple[int, float]:
        """The same of `lora`."""
        measured = self.in_order()[WARM_UP * self.ranks * self.examples :]
        batches = [measured[i : i + self.examples] for i in range(0, len(measured), self.examples)]
        targets = sum(len(example.input_ids) - example.prompt_length for example in measured)
        tokens = sum(len(example.input_ids) for example in measured)
        computed = sum(len(batch) * max(len(example.input_ids) for example in batch) for batch in batches)
        return targets, 1 - tokens / computed


def workload_of(options: argparse.Namespace, directory: Path) -> RealWorkload:
    """What both systems train on.

    Raises:
        LanderError, ValueError: it cannot be run.
    """
    changes = [f"run_dir={directory}", *([f"model.path={options.model}"] if options.model else [])]
    recipe = load_checked(options.recipe, changes, ("prepare",))
    if recipe.data.pairs != PAIRS:
        raise ValueError(f"{options.recipe}: data.pairs must be {', '.join(PAIRS)}")
    prepare.run(recipe, RunDirectory(recipe.run_dir))
    config, _ = hf_config(recipe.model)
    data = PreparedData.load(RunDirectory(recipe.run_dir), recipe)
    lengths = np.concatenate([split.lengths for split in data.split("train").values()])
    workload = RealWorkload(
        model=recipe.model.path,
        deepspeed=str(options.deepspeed),
        dtype=options.dtype,
        ranks=options.ranks,
        tokens=options.tokens,
        length=round(float(lengths.mean())),
        layers=chosen_layers(options.layers, config.num_hidden_layers),
        vocabulary=config.vocab_size,
        steps=WARM_UP + options.steps,
        recipe=recipe,
    )
    if not workload.examples or len(lengths) < workload.steps * workload.ranks * workload.examples:
        raise ValueError(
            "--tokens and --steps: less than a sentence per batch, or more than the corpora have"
        )
    return workload


def figures(workload: RealWorkload, measured: dict[str, Measured]) -> dict[str, Any]:
    """Target tokens a second of both, on the clock and per second of processor time, and shares of padding."""
    ours, waste_ours = workload.packed_targets_and_waste()
    theirs, waste_padded = workload.padded_targets_and_waste()
    speed = {}
    for name, targets in (("lander", ours), ("lora", theirs)):
        times = measured[name].times
        speed[name] = {
            "target_tokens": targets,
            "per_second": round(targets / sum(taken.seconds for taken in times), 2),
            "per_processor_second": round(targets / sum(taken.processor_seconds for taken in times), 2),
        }
    return {
        "ratio": round(speed["lander"]["per_second"] / speed["lora"]["per_second"], 4),
        "processor_ratio": round(
            speed["lander"]["per_processor_second"] / speed["lora"]["per_processor_second"], 4
        ),
        "padding_waste_ours": round(waste_ours, 4),
        "padding_waste_padded": round(waste_padded, 4),
        "systems": speed,
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--recipe",
        default=ROOT / "recipes" / "demo.yaml",
        type=Path,
        help="whose data and base (%(default)s)",
    )
    add("--model", type=Path, help="another base than the recipe's")
    add("--ranks", default=2, type=int, help="data-parallel ranks (%(default)s)")
    add("--tokens", default=512, type=int, help="tokens per rank and step (%(default)s)")
    add("--steps", default=8, type=int, help=f"measured steps, after {WARM_UP} for warming up (%(default)s)")
    add("--layers", default="middle", help="layers of lander: middle, last, or numbers (%(default)s)")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="precision (%(default)s)")
    add("--deepspeed", default=ROOT / "ds_configs" / "270m" / "zero3.json", type=Path, help="JSON of both")
    add("--json", action="store_true", help="print JSON instead of lines")
    return parser.parse_args(arguments)


def main() -> int:
    """Run; returns the exit code."""
    options = parse()
    threads, load = set_environment(options.ranks), os.getloadavg()[0]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="lander-throughput-") as name:
        directory = Path(name)
        try:
            if min(options.ranks, options.tokens, options.steps) < 1:
                raise ValueError("--ranks, --tokens and --steps must be at least 1")
            workload = workload_of(options, directory / "data")
            measured = sit({name: (name, workload) for name in ("lander", "lora")}, directory)
        except (LanderError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except SystemFailed as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        actual = figures(workload, measured)
    actual |= {
        "model": workload.model,
        "tokens_per_step": workload.tokens_per_step,
        "mean_length": workload.length,
        "layers": workload.layers,
        "dtype": workload.dtype,
        **circumstances(threads, load),
    }
    if options.json:
        print(json.dumps(actual, indent=2))
    else:
        for system, speed in actual["systems"].items():
            print(f"{system}: {speed['per_second']:.0f} target tokens a second")
        print(f"ratio {actual['ratio']:.2f} (goal: at least {GOAL:.1f})")
        print(f"padding: {actual['padding_waste_ours']:.1%} here, {actual['padding_waste_padded']:.1%} there")
    return 0


if __name__ == "__main__":
    sys.exit(main())
