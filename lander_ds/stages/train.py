"""Stage train: base model + selection + prepared data -> checkpoints, metrics.jsonl, training.json."""

from __future__ import annotations

import logging
import resource
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lander_ds.checkpoint import checkpoint
from lander_ds.config.recipe import Recipe
from lander_ds.data.prepared import PreparedData
from lander_ds.families.weights import base_fingerprint
from lander_ds.parallel import comm, zero3
from lander_ds.run import RunDirectory, file_hash, section, write_json
from lander_ds.training.journal import Journal
from lander_ds.training.loop import Loop, Outcome
from lander_ds.training.session import METHODS_WITH_SELECTION, Session, open_session
from lander_ds.training.validation import validation_loss

logger = logging.getLogger(__name__)


def run(recipe: Recipe, run: RunDirectory, force: bool = False) -> None:
    """Train the recipe's method (collective)."""
    data = PreparedData.load(run, recipe)
    inputs = {
        "data": data.hash,
        "base": base_fingerprint(recipe.model.path),
        "deepspeed": file_hash(Path(recipe.deepspeed)),
    }
    if recipe.train.method in METHODS_WITH_SELECTION:
        inputs["selection"] = file_hash(run.selection) if run.selection.exists() else "missing"
    options = {**section(recipe, "train", "routing", "topology", "seed"), "dtype": recipe.model.dtype}
    if comm.from_rank_zero(comm.rank() == 0 and not force and run.up_to_date("train", options, inputs)):
        logger.info("train: up to date")
        return
    started = time.monotonic()
    session = open_session(recipe, run)
    _announce(session)
    before = zero3.frozen_digest(session.model)
    if comm.rank() == 0:
        checkpoint.remove_all(run.checkpoints)
        run.training_summary.unlink(missing_ok=True)
    comm.barrier()
    journal = Journal(run.metrics, session.engine.monitor, recipe.train.log_every)
    loop = Loop(session, data, journal, lambda step: _save(session, run, step))
    outcome = loop.run()
    if loop.valid and not recipe.train.valid_every:
        journal.validation(outcome.steps, validation_loss(session, loop.valid))
    journal.close()
    unchanged = all(comm.gather_objects(before == zero3.frozen_digest(session.model)))
    seconds = time.monotonic() - started
    summary = _summary(session, outcome, unchanged, seconds)
    if comm.rank() == 0:
        write_json(run.training_summary, summary)
        outputs = [run.training_summary, run.checkpoints / f"step-{outcome.steps}"]
        run.record("train", options, inputs, outputs, seconds)
    comm.barrier()
    session.engine.destroy()


def _announce(session: Session) -> None:
    trained, total = session.trained_parameters, session.total_parameters
    held = comm.gather_objects(zero3.rank_bytes(session.engine))
    logger.info(
        "%s: %s of %s parameters are trained (%.2f %%), %d micro-batches per rank and step",
        session.recipe.train.method,
        f"{trained:,}",
        f"{total:,}",
        100.0 * trained / total,
        session.micro_batches,
    )
    for name, size in session.group_sizes.items():
        logger.info("  group %s: %s parameters", name, f"{size:,}")
    for rank, part in enumerate(held):
        logger.info(
            "  rank %d holds %.1f MB of weights, %.1f MB of gradients, %.1f MB of optimizer state",
            rank,
            part.weights / 1e6,
            part.gradients / 1e6,
            part.optimizer / 1e6,
        )


def _save(session: Session, run: RunDirectory, step: int) -> None:
    """Write `checkpoints/step-N` (collective: every rank takes part in gathering)."""
    tensors: dict[str, torch.Tensor] = {}
    for name, value in zero3.trained_tensors(session.model):
        # One rank writes, so one rank holds them all.
        if comm.rank() == 0:
            tensors[name.removeprefix("model.")] = value.cpu()
    recipe = session.recipe
    if comm.rank() == 0:
        selection = run.selection if recipe.train.method in METHODS_WITH_SELECTION else None
        description: dict[str, Any] = {
            "method": recipe.train.method,
            "base_fingerprint": session.fingerprint,
            "pairs": list(recipe.data.pairs),
            "routing": asdict(recipe.routing),
            "lora": asdict(recipe.train.lora),
        }
        path = checkpoint.write(run.checkpoints, step, tensors, selection, description)
        logger.info("wrote %s", path)
    comm.barrier()


def _summary(session: Session, outcome: Outcome, unchanged: bool, seconds: float) -> dict[str, Any]:
    held = comm.gather_objects(zero3.rank_bytes(session.engine))
    return {
        "method": session.recipe.train.method,
        "trained_parameters": session.trained_parameters,
        "total_parameters": session.total_parameters,
        "ranks": comm.world_size(),
        "steps": outcome.steps,
        "stopped_early": outcome.stopped_early,
        "weight_bytes_per_rank": [part.weights for part in held],
        "gradient_bytes_per_rank": [part.gradients for part in held],
        "optimizer_bytes_per_rank": [part.optimizer for part in held],
        "peak_memory_bytes_per_rank": comm.gather_objects(_peak_memory()),
        "frozen_unchanged": unchanged,
        "groups": session.group_sizes,
        "seconds": round(seconds, 2),
        "checkpoint": f"checkpoints/step-{outcome.steps}",
    }


def _peak_memory() -> int:
    """The most memory this process has held, in bytes: of its GPU, or resident where it has none."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    # Linux counts in KiB.
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
