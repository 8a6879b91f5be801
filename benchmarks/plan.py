#!/usr/bin/env python
"""Are the bytes that `lander plan` predicts those of real tensors?

Small models, or one of yours, are trained for two steps on CPU ranks in every topology; what each rank held and what
lay on disk is compared with the prediction. docs/plan.md has the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import processor  # noqa: F401 - before DeepSpeed is imported
import torch
from plan_ranks import EXAMPLE_TOKENS, MEASURED, TARGET_SHARE, Job
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig, PretrainedConfig

from lander_ds.cluster.planning.activations import trace
from lander_ds.cluster.planning.anatomy import anatomy, estimated_selection
from lander_ds.cluster.planning.memory import (
    checkpoint_bytes,
    gradient_bytes,
    optimizer_elements,
    state_bytes,
    weight_bytes,
)
from lander_ds.cluster.planning.plan import sharding_of
from lander_ds.cluster.planning.workload import Workload, micro_batch
from lander_ds.common.errors import LanderError
from lander_ds.common.files import read_json, write_json
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.recipe import ModelConfig, Recipe
from lander_ds.config.schema.data import DataConfig
from lander_ds.config.schema.method import BankChoice, LayerChoice, SelectConfig
from lander_ds.config.schema.training import TrainConfig
from lander_ds.models.loading import build
from lander_ds.models.weights import base_fingerprint

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support import worlds

TOLERANCE = 0.05
PAIRS = ("en-de", "en-fr", "en-ru", "en-cs")
WORLDS: dict[int, tuple[tuple[int, int], ...]] = {
    1: ((1, 1),),
    2: ((1, 2), (2, 1)),
    4: ((1, 4), (4, 1), (2, 2)),
}
"""Ranks -> grids of pipeline stages and data-parallel ranks."""
Worlds = Mapping[int, Sequence[tuple[int, int]]]
JOB_SECONDS = 900.0
"""What a training may take; a model of one's own can be large."""
THRESHOLD = 1000
"""Parameters up to this size stay whole under ZeRO-3: in the small models some, in large ones norms."""


@dataclass(frozen=True)
class Case:
    """One figure."""

    case: str
    """Model, method, topology, pipeline stages x data-parallel ranks, and the rank it was measured on."""
    quantity: str
    predicted: int
    measured: int

    @property
    def error(self) -> float:
        """Relative to what was measured; 0 where both are 0."""
        if self.predicted == self.measured:
            return 0.0
        return abs(self.predicted - self.measured) / self.measured if self.measured else float("inf")

    @property
    def within(self) -> bool:
        """Whether the prediction is good enough."""
        return self.error <= TOLERANCE


def validate(model: Path | None, worlds: Worlds = WORLDS) -> list[Case]:
    """Measure and compare.

    Args:
        model: a model directory with weights; None: small random models of two families.
        worlds: numbers of ranks, and the grids that each is tried as.

    Raises:
        LanderError: a rank failed.
        ModelError: the model is unfit.
    """
    with tempfile.TemporaryDirectory(prefix="lander-plan-") as name:
        root = Path(name)
        models = [model] if model is not None else [_gated(root / "llama"), _plain(root / "bloom")]
        for topology, zero in _ZERO.items():
            write_json(root / f"{topology}.json", {"zero_optimization": zero, "steps_per_print": 1000000})
        jobs = {ranks: list(_jobs(root, models, ranks, grids)) for ranks, grids in worlds.items()}
        cases: list[Case] = []
        for ranks, own in jobs.items():
            _run(root, ranks, own)
            for job in own:
                cases += _compare(job, ranks)
    return cases


_ZERO: dict[str, dict[str, Any]] = {
    "zero3": {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": THRESHOLD},
    "replicated": {"stage": 1},
    "pipeline": {"stage": 1},
    "pipeline_zero3": {"stage": 3, "stage3_param_persistence_threshold": THRESHOLD},
}


def _gated(path: Path) -> Path:
    """A small LLaMA: gated FFN, no biases, untied head."""
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    return _save(config, path)


def _plain(path: Path) -> Path:
    """A small BLOOM: plain FFN with biases, tied head, attention over the whole row."""
    return _save(BloomConfig(vocab_size=1000, hidden_size=64, n_layer=6, n_head=4), path)


def _save(config: PretrainedConfig, path: Path) -> Path:
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return path


def _jobs(root: Path, models: Sequence[Path], ranks: int, grids: Sequence[tuple[int, int]]) -> Iterator[Job]:
    for stages, data_ranks in grids:
        # ZeRO-3 comes last: it replaces torch's linear function for as long as the process lives.
        for topology in ("replicated", "zero3") if stages == 1 else ("pipeline", "pipeline_zero3"):
            for model in models:
                # The other methods once, where the model is small.
                methods = ("lander", "layers", "lora") if (ranks, topology) == (2, "zero3") else ("lander",)
                for method in methods if model.is_relative_to(root) else ("lander",):
                    case = f"{model.name} {method} {topology} {stages}x{data_ranks}"
                    yield Job(case, _recipe(root, model, method, topology, stages, case))


def _recipe(root: Path, model: Path, method: Any, topology: Any, stages: int, case: str) -> Recipe:
    recipe = Recipe(
        run_dir=str(root / case.replace(" ", "-")),
        model=ModelConfig(str(model)),
        data=DataConfig(PAIRS, ()),
        deepspeed=str(root / f"{topology}.json"),
        topology=topology,
        pipeline_stages=stages,
        select=SelectConfig(LayerChoice(k=3), BankChoice(rho=0.9, min_awareness=0.1)),
        train=TrainConfig(method=method, steps=2, batch_tokens=512, pack_tokens=64, save_in_background=False),
    )
    _save_selection(recipe)
    return recipe


def _save_selection(recipe: Recipe) -> None:
    model, family = build(recipe.model)
    layers, neurons = len(family.layers_of(model)), family.neurons(model)
    estimated = estimated_selection(recipe.select, PAIRS, layers, neurons)
    metadata = {"base_fingerprint": base_fingerprint(recipe.model.path)}
    replace(estimated, metadata=metadata).save(RunDirectory(recipe.run_dir).selection)


def _run(root: Path, ranks: int, jobs: Sequence[Job]) -> None:
    """Run jobs one after another in a world of `ranks` processes on this machine.

    Raises:
        LanderError: a rank failed, or did not end a job in time; none is left running.
    """
    threads = int(os.environ.get("OMP_NUM_THREADS", max(1, (os.cpu_count() or 1) // ranks)))
    try:
        with _stdout_to_stderr():
            worlds.run_world(root, ranks, jobs, threads, JOB_SECONDS)
    except RuntimeError as error:
        raise LanderError(f"the measurement failed: {error}") from None


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """What starts in this context writes to standard error: libraries talk, and standard output is for results."""
    before = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(before, 1)
        os.close(before)


def _compare(job: Job, ranks: int) -> Iterator[Case]:
    recipe, run = job.recipe, RunDirectory(job.recipe.run_dir)
    measured = read_json(run.path / MEASURED, "validate again")
    stages = recipe.pipeline_stages
    model = anatomy(recipe)
    batch, count = micro_batch(recipe, Workload(EXAMPLE_TOKENS, TARGET_SHARE), ranks // stages)
    sharding = sharding_of(recipe, stages, [ranks], count)
    for stage, span in enumerate(model.stage_spans(stages)):
        tensors = model.tensors(span)
        predicted = {
            "weights": weight_bytes(tensors, sharding, model.item_bytes),
            "gradients": gradient_bytes(tensors, sharding),
            "optimizer": state_bytes(recipe.train) * optimizer_elements(tensors, sharding),
        }
        for data_rank in range(ranks // stages):
            rank = stage * (ranks // stages) + data_rank
            for quantity, value in predicted.items():
                yield Case(f"{job.name} rank {rank}", quantity, value, measured["ranks"][rank][quantity])
    yield Case(job.name, "checkpoint", checkpoint_bytes(model), measured["checkpoint"])
    if measured["activations"] is not None:
        kept = trace(recipe, batch, sharding.sharded, fused=False)
        everything = kept.kept(0, model.layers, True, model.first_trained, recompute=False)
        yield Case(job.name, "activations", everything, measured["activations"])


def case_table(cases: Sequence[Case]) -> Table:
    """One row per figure."""
    table = Table(title="Bytes, predicted and measured")
    table.add_column("case")
    table.add_column("quantity")
    for heading in ("predicted", "measured", "off by"):
        table.add_column(heading, justify="right")
    for case in cases:
        colour = "" if case.within else "[red]"
        figures = (f"{case.predicted:,}", f"{case.measured:,}", f"{colour}{100 * case.error:.2f} %")
        table.add_row(case.case, case.quantity, *figures)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 1 when a prediction is more than TOLERANCE off, 2 when a rank failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="a model with weights (default: two small random ones)"
    )
    parser.add_argument(
        "--json", action="store_true", help='print {"cases": [{case, quantity, predicted, measured}]}'
    )
    options = parser.parse_args(arguments)
    try:
        cases = validate(options.model)
    except LanderError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    if options.json:
        print(json.dumps({"cases": [vars(case) for case in cases]}, indent=2))
    else:
        Console(highlight=False, width=110).print(case_table(cases))
    return 0 if all(case.within for case in cases) else 1


if __name__ == "__main__":
    sys.exit(main())
