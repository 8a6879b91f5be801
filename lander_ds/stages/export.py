"""Stage export: newest checkpoint + base -> HF directories under `export/`. Needs no DeepSpeed and one process."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch

from lander_ds.checkpoint import checkpoint
from lander_ds.config.recipe import Recipe
from lander_ds.data.prepared import PreparedData
from lander_ds.errors import ArtefactError
from lander_ds.export.dense import export_dense
from lander_ds.export.routed import export_routed
from lander_ds.export.trained import TrainedModel
from lander_ds.export.verify import compare
from lander_ds.families.weights import base_fingerprint
from lander_ds.parallel import comm
from lander_ds.run import RunDirectory, file_hash, section, write_json

logger = logging.getLogger(__name__)

RELATIVE_TOLERANCE = 1e-5
WRITERS = {"dense": export_dense, "routed": export_routed}


def run(recipe: Recipe, run: RunDirectory, force: bool = False) -> None:
    """Write and verify every format of the recipe (rank 0 works, the others wait)."""
    if comm.rank() == 0:
        _export(recipe, run, force)
    comm.barrier()


def _export(recipe: Recipe, run: RunDirectory, force: bool) -> None:
    found = checkpoint.newest(run.checkpoints)
    inputs = {
        "base": base_fingerprint(recipe.model.path),
        "checkpoint": file_hash(found.path / checkpoint.STATE),
    }
    options = section(recipe, "export")
    if not force and run.up_to_date("export", options, inputs):
        logger.info("export: up to date")
        return
    started = time.monotonic()
    trained = TrainedModel.open(recipe, found)
    dtype = None if recipe.export.dtype == "model" else getattr(torch, recipe.export.dtype)
    for name in recipe.export.formats:
        WRITERS[name](trained, run.export / name, dtype)
        logger.info("wrote %s", run.export / name)
    outputs = [run.export / name for name in recipe.export.formats]
    if recipe.export.verify:
        outputs.append(_verify(recipe, run, trained))
    run.record("export", options, inputs, outputs, time.monotonic() - started)


def _verify(recipe: Recipe, run: RunDirectory, trained: TrainedModel) -> Path:
    """Compare every export that must be exact with the trained model; one that differs is an error."""
    data = PreparedData.load(run, recipe)
    prompts = {}
    for pair, split in (data.split("test") or data.split("train")).items():
        count = min(recipe.export.verify, len(split))
        prompts[pair] = [tokens[:prompt].tolist() for tokens, prompt in map(split.tokens, range(count))]
    results: dict[str, Any] = {}
    for name in recipe.export.formats:
        exact = _is_exact(name, trained, recipe)
        result = compare(recipe, run, run.export / name, prompts, generate=exact)
        results[name] = {**result, "expected_exact": exact}
        close = result["max_logit_difference"] <= RELATIVE_TOLERANCE * max(1.0, result["max_logit"])
        if exact and not (close and result["same_greedy"]):
            raise ArtefactError(
                f"{run.export / name} does not compute what was trained (logits differ by "
                f"{result['max_logit_difference']:.2e}, same greedy translations: {result['same_greedy']}): "
                "do not use it; please report this with the recipe"
            )
        logger.info(
            "%s export (%s): logits differ by %.1e from the trained model's",
            name,
            "exact" if exact else "an approximation",
            result["max_logit_difference"],
        )
    path = run.export / "verification.json"
    write_json(path, results)
    return path


def _is_exact(name: str, trained: TrainedModel, recipe: Recipe) -> bool:
    """Whether an export can hold what was trained without rounding or leaving anything out."""
    state = trained.checkpoint.state
    base = trained.weights.read(next(iter(trained.weights.names()))).dtype
    exported: torch.dtype = base if recipe.export.dtype == "model" else getattr(torch, recipe.export.dtype)
    computed: torch.dtype = getattr(torch, recipe.model.dtype)
    if name == "dense" and state["method"] == "lander" and state["routing"]["gate"] != "none":
        return False
    if state["method"] == "lora":
        # Base plus adapters is a float32 sum.
        return exported == computed == torch.float32
    return torch.promote_types(exported, computed) == exported
