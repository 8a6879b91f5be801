"""Stage export: newest checkpoint + base -> HF directories and deltas under `export/`. Needs no DeepSpeed and one
process.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from lander_ds.checkpoint import checkpoint
from lander_ds.checkpoint.checkpoint import Checkpoint
from lander_ds.checkpoint.choice import chosen, warn_of_changes
from lander_ds.common.errors import ArtefactError
from lander_ds.common.files import file_hash, replacing, write_json
from lander_ds.config.loading import section
from lander_ds.config.recipe import Recipe
from lander_ds.data.prepared import PreparedData
from lander_ds.distributed.start import Start
from lander_ds.export.card import Exactness, facts_of, write_card
from lander_ds.export.delta import Delta
from lander_ds.export.delta_write import export_delta
from lander_ds.export.dense import export_dense
from lander_ds.export.fold import MEAN, folded, folds_of, mean_gates
from lander_ds.export.quality import folding_loss
from lander_ds.export.routed import export_routed
from lander_ds.export.trained import TrainedModel
from lander_ds.export.verify import compare
from lander_ds.export.writer import GIGABYTE, Form
from lander_ds.inference.provenance import data_hash
from lander_ds.stages.stage import Part, Result, Stage

logger = logging.getLogger(__name__)

RELATIVE_TOLERANCE = 1e-5


def _parts(start: Start) -> list[Part]:
    """One part: every format and fold of the recipe, written, verified and described."""
    recipe, run = start.recipe, start.run
    newest = chosen(run.checkpoints, recipe.export.checkpoint, "export.checkpoint")
    warn_of_changes(newest.state, recipe, run, data_hash(start))
    inputs = {"base": start.base_fingerprint, "checkpoint": file_hash(newest.path / checkpoint.STATE)}
    if run.scores.exists():
        inputs["scores"] = file_hash(run.scores)  # they stand in the model cards
    return [Part("export", section(recipe, "export"), inputs, lambda: _export(start, newest))]


STAGE = Stage("export", _parts)
run = STAGE.run


def _export(start: Start, newest: Checkpoint) -> Result:
    """Write, verify and describe everything; only then does it take the place of what was there before."""
    recipe, run = start.recipe, start.run
    trained, facts = TrainedModel.open(start, newest), facts_of(start, newest.state)
    names = [*recipe.export.formats, *(f"dense-{pair}" for pair in folds_of(trained, recipe.export.fold))]
    outputs = [run.export / name for name in names]
    with ExitStack() as replaced:
        new = {path.name: replaced.enter_context(replacing(path)) for path in outputs}
        _write(start, trained, newest, new, facts)
        results = _verify(start, trained, new) if recipe.export.verify else {}
        losses = _folding_loss(start, new)
        for fold, loss in losses.items():
            results.setdefault(f"dense-{fold}", {})["loss"] = loss
        for name, directory in new.items():
            write_card(directory, facts, name, _exactness(name, trained, recipe, losses))
    proof = run.export / "verification.json"
    # What proved the exports before proves nothing of these.
    proof.unlink(missing_ok=True)
    if results:
        outputs.append(proof)
        write_json(proof, results)
    for path in outputs:
        logger.info("wrote %s", path)
    return Result(outputs)


def _write(
    start: Start,
    trained: TrainedModel,
    newest: Checkpoint,
    new: Mapping[str, Path],
    facts: Mapping[str, Any],
) -> None:
    """Write every export into its directory; `facts` are for a delta to carry along."""
    export = start.recipe.export
    form = Form(
        None if export.dtype == "model" else getattr(torch, export.dtype),
        None if export.shard_size is None else round(export.shard_size * GIGABYTE),
    )
    means = mean_gates(newest.state, start.run.metrics)
    for name, directory in new.items():
        match name:
            case "dense":
                if trained.pairs_differ:
                    logger.warning("dense export drops the gates: it only approximates the trained model")
                export_dense(trained.source, directory, form)
            case "routed":
                export_routed(trained, directory, form)
            case "delta":
                export_delta(trained, directory, means, facts)
            case _:
                export_dense(folded(trained, means, name.removeprefix("dense-")), directory, form)


def _verify(start: Start, trained: TrainedModel, new: Mapping[str, Path]) -> dict[str, Any]:
    """Compare every export with the trained model; one that must be exact and differs is an error."""
    recipe, run = start.recipe, start.run
    data = PreparedData.load(run, recipe)
    prompts = {}
    for pair, split in (data.split("test") or data.split("train")).items():
        count = min(recipe.export.verify, len(split))
        prompts[pair] = [tokens[:prompt].tolist() for tokens, prompt in map(split.tokens, range(count))]
    results: dict[str, Any] = {}
    for name, directory in new.items():
        if name == "delta":
            results[name] = _verify_delta(directory, trained)
            continue
        pair = name.removeprefix("dense-")
        exact = _is_exact(name, trained, recipe)
        asked = {pair: prompts[pair]} if pair in prompts else prompts
        result = compare(start, directory, asked, generate=exact)
        results[name] = {**result, "expected_exact": exact}
        if not math.isfinite(result["max_logit_difference"]):
            raise ArtefactError(
                f"{run.export / name} computes NaN or infinity: it was deleted, and what was there before is unchanged; "
                "set export.dtype: bfloat16 or float32, or export another checkpoint"
            )
        close = result["max_logit_difference"] <= RELATIVE_TOLERANCE * max(1.0, result["max_logit"])
        if exact and not (close and result["same_greedy"]):
            raise ArtefactError(
                f"{run.export / name} does not compute what was trained (logits differ by "
                f"{result['max_logit_difference']:.2e}, same greedy translations: {result['same_greedy']}): "
                "it was deleted, and what was there before is unchanged; please report this with the recipe"
            )
        logger.info(
            "%s export (%s): logits differ by %.1e from the trained model's",
            name,
            "exact" if exact else "an approximation",
            result["max_logit_difference"],
        )
    return results


def _verify_delta(directory: Path, trained: TrainedModel) -> dict[str, Any]:
    """Put the delta on the base and take it off again, by the hashes of every tensor."""
    delta = Delta.open(directory)
    delta.check(trained.weights, trained.weights.directory, back=False)
    size = sum(path.stat().st_size for path in directory.iterdir())
    return {"expected_exact": True, "tensors": len(delta.changes), "bytes": size, "reversible": True}


def _folding_loss(start: Start, new: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    recipe = start.recipe
    if not recipe.export.fold or not recipe.export.fold_sentences:
        return {}
    folds = {pair: new[f"dense-{pair}"] for pair in recipe.export.fold}
    return folding_loss(start, PreparedData.load(start.run, recipe), folds)


def _exactness(
    name: str, trained: TrainedModel, recipe: Recipe, losses: Mapping[str, Mapping[str, Any]]
) -> Exactness:
    """What the model card says of an export."""
    form = Form(None if recipe.export.dtype == "model" else getattr(torch, recipe.export.dtype))
    if name.startswith("dense-"):
        pair = name.removeprefix("dense-")
        return Exactness.folded(pair, losses.get(pair))
    if name == "dense" and trained.pairs_differ:
        return Exactness.without_gates()
    return Exactness.exact() if name == "delta" else Exactness.typed(form)


def _is_exact(name: str, trained: TrainedModel, recipe: Recipe) -> bool:
    """Whether an export can hold what was trained without rounding or leaving anything out."""
    base = trained.weights.read(next(iter(trained.weights.names()))).dtype
    exported: torch.dtype = base if recipe.export.dtype == "model" else getattr(torch, recipe.export.dtype)
    computed: torch.dtype = getattr(torch, recipe.model.dtype)
    if name == "dense" and trained.pairs_differ:
        return False
    if name.startswith("dense-") and (trained.routing.gate != "none" or name == f"dense-{MEAN}"):
        return False
    if trained.method == "lora":
        # Base plus adapters is a float32 sum.
        return exported == computed == torch.float32
    return torch.promote_types(exported, computed) == exported
