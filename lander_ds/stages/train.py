"""Stage train: base model + selection + prepared data -> checkpoints, metrics.jsonl, training.json."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lander_ds.checkpoint.checkpoint import STATE, Checkpoint
from lander_ds.checkpoint.earlier_run import check_fit, earlier_checkpoint
from lander_ds.checkpoint.identity import identity_of, starting_point
from lander_ds.common.errors import ArtefactError
from lander_ds.common.files import file_hash, write_json
from lander_ds.config.loading import section
from lander_ds.data.prepared import PreparedData
from lander_ds.distributed import accelerator, collectives, process_group
from lander_ds.distributed.start import Start
from lander_ds.distributed.watchdog import Watchdog
from lander_ds.evaluation.valid_translations import ValidationTranslations, scorer
from lander_ds.stages.stage import Part, Result, Stage
from lander_ds.training.metrics_logger import MetricsLogger
from lander_ds.training.preemption import Preempted, StopRequest
from lander_ds.training.prefix_cache import open_prefixes
from lander_ds.training.progress import Progress
from lander_ds.training.saver import Saver
from lander_ds.training.session import METHODS_WITH_SELECTION, Session, open_session
from lander_ds.training.trackers import open_trackers
from lander_ds.training.trainer import Outcome, Trainer
from lander_ds.training.validation import validation_loss

logger = logging.getLogger(__name__)


def _parts(start: Start) -> list[Part]:
    """One part: the recipe's method, trained.

    Raises:
        ArtefactError: there are checkpoints and neither --force nor --auto-resume says what to do with them; or the
            newest belongs to another training.
        ConfigError: the newest checkpoint has more steps than `train.steps`.
        Preempted: a signal asked to stop; a checkpoint was saved.
        TrainingDiverged, SaveFailed: see there.
    """
    recipe, run = start.recipe, start.run
    data, replay = PreparedData.load(run, recipe), PreparedData.load_replay(run, recipe)
    inputs = {
        "data": data.content_hash("train", "valid"),
        "base": start.base_fingerprint,
        "deepspeed": file_hash(Path(recipe.deepspeed)),
    }
    if recipe.train.method in METHODS_WITH_SELECTION:
        inputs["selection"] = file_hash(run.selection) if run.selection.exists() else "missing"
    if replay is not None:
        inputs["replay"] = replay.content_hash("train")
    options = {
        **section(recipe, "train", "routing", "topology", "pipeline_stages", "pipeline_cut", "seed"),
        **recipe.model.numerics,
    }
    # Change no result; records of before they existed lack them.
    del options["train"]["prefix_cache"], options["train"]["trackers"]
    if recipe.train.objective == "likelihood":
        del options["train"]["objective"], options["train"]["cpo"]
    # What it holds is an input; where it lies changes nothing.
    del options["train"]["start_from"]
    if recipe.train.start_from is not None:
        inputs["start_from"] = file_hash(earlier_checkpoint(recipe.train.start_from).path / STATE)
    # Was a boolean when there was only the loss.
    if recipe.train.translated_metric is None:
        options["train"]["keep_best"] = recipe.train.keep_best == "loss"
    if replay is not None:
        options["replay_share"] = recipe.data.replay.share
    return [Part("train", options, inputs, lambda: _train(start, data, replay, inputs))]


STAGE = Stage("train", _parts)
run = STAGE.run


def _train(
    start: Start, data: PreparedData, replay: PreparedData | None, inputs: Mapping[str, str]
) -> Result:
    recipe, run, started = start.recipe, start.run, time.monotonic()
    identity = identity_of(recipe, inputs)
    checkpoint = starting_point(run.checkpoints, identity, start.force, start.auto_resume, start.is_base)
    if checkpoint is not None and checkpoint.step > recipe.train.steps:
        raise ArtefactError(
            f"train.steps: {recipe.train.steps}, but {checkpoint.path} has come further already: raise train.steps, "
            f"start anew in another run_dir, or translate and export an earlier one with checkpoint: step-N"
        )
    earlier: Checkpoint | None = None
    if checkpoint is None and recipe.train.start_from is not None:
        earlier = earlier_checkpoint(recipe.train.start_from)
        check_fit(earlier, identity, start.is_base)
        logger.info("starting from %s", earlier.path)
    with (
        open_trackers(recipe, run, checkpoint is not None) as trackers,
        Watchdog(run.path / "stalled", recipe.train.stall_seconds, "train") as watchdog,
    ):
        session = open_session(start, checkpoint, earlier)
        _announce(session)
        before = session.engine.frozen_digest()
        prefixes = open_prefixes(start, session, data, watchdog.beat, replay)
        progress = Progress() if checkpoint is None else Progress(**checkpoint.state["progress"])
        if process_group.rank() == 0:
            run.training_summary.unlink(missing_ok=True)
        metrics = MetricsLogger(
            run.metrics, session.engine.monitor, recipe.train.log_every, progress.done, trackers
        )
        saver = Saver(session, run, identity)
        score = None
        if recipe.train.translated_metric is not None:
            by_metric = scorer(recipe, run.cache(recipe.data.cache_dir))
            score = ValidationTranslations(recipe, session.model.model, data, by_metric, watchdog.beat)
        trainer = Trainer(session, data, metrics, saver, progress, watchdog, prefixes, score, replay)
        # Another signal must not end the process before the last checkpoint is there.
        with StopRequest():
            outcome = trainer.run()
            watchdog.beat("validation at the end")
            if trainer.valid and not recipe.train.valid_every and not outcome.preempted:
                metrics.validation(outcome.steps, validation_loss(session, trainer.valid))
            metrics.close()
            watchdog.beat("writing the last checkpoint")
            saver.finish()
        if outcome.preempted:
            raise Preempted(
                f"asked to stop: step {outcome.steps} is saved; start the same command with --auto-resume to go on"
            )
    unchanged = all(collectives.gather_objects(before == session.engine.frozen_digest()))
    summary = _summary(session, outcome, unchanged, time.monotonic() - started)
    if process_group.rank() == 0:
        write_json(run.training_summary, summary)
    session.engine.destroy()
    return Result([run.training_summary, run.checkpoints / f"step-{outcome.steps}"])


def _announce(session: Session) -> None:
    trained, total = session.trained_parameters, session.total_parameters
    bytes_per_rank = collectives.gather_objects(session.engine.rank_bytes())
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
    for rank, part in enumerate(bytes_per_rank):
        logger.info(
            "  rank %d holds %.1f MB of weights, %.1f MB of optimizer state",
            rank,
            part.weights / 1e6,
            part.optimizer / 1e6,
        )


def _summary(session: Session, outcome: Outcome, unchanged: bool, seconds: float) -> dict[str, Any]:
    bytes_per_rank = collectives.gather_objects(session.engine.rank_bytes())
    return {
        "method": session.recipe.train.method,
        "trained_parameters": session.trained_parameters,
        "total_parameters": session.total_parameters,
        "topology": session.recipe.topology,
        "ranks": process_group.world_size(),
        "layers_per_rank": collectives.gather_objects([session.model.span.start, session.model.span.stop]),
        "steps": outcome.steps,
        "stopped_early": outcome.stopped_early,
        "skipped_steps": outcome.skipped,
        "weight_bytes_per_rank": [part.weights for part in bytes_per_rank],
        "gradient_bytes_per_rank": [part.gradients for part in bytes_per_rank],
        "optimizer_bytes_per_rank": [part.optimizer for part in bytes_per_rank],
        "peak_memory_bytes_per_rank": collectives.gather_objects(accelerator.peak_memory()),
        "frozen_unchanged": unchanged,
        "groups": session.group_sizes,
        "seconds": round(seconds, 2),
        "checkpoint": f"checkpoints/step-{outcome.steps}",
    }
