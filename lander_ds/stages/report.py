"""Stage report: everything the run has written so far -> report.html. On rank 0 only."""

from __future__ import annotations

import logging
import time

from lander_ds.common.console import write_line
from lander_ds.common.files import file_hash, write_text
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.loading import section
from lander_ds.config.recipe import Recipe
from lander_ds.distributed import collectives, process_group
from lander_ds.report.page import render_report

logger = logging.getLogger(__name__)


def run(recipe: Recipe, run: RunDirectory, force: bool = False) -> None:
    """Write `report.html` from whatever stages have run; it says what is missing.

    Raises:
        ArtefactError: no stage has run, or an artefact is damaged.
    """
    if process_group.rank() == 0:
        _report(recipe, run, force)
    collectives.barrier()


def _report(recipe: Recipe, run: RunDirectory, force: bool) -> None:
    started = time.monotonic()
    sources = [
        run.data / "statistics.json",
        run.awareness,
        run.selection,
        run.metrics,
        run.training_summary,
        run.scores,
        *sorted(run.translations.glob("*/*.jsonl")),
    ]
    options = section(
        recipe, "run_dir", "model", "data", "select", "routing", "train", "translate", "score", "seed"
    )
    inputs = {run.relative(path): file_hash(path) for path in sources if path.exists()}
    if not force and run.up_to_date("report", options, inputs):
        logger.info("report: up to date")
    else:
        write_text(run.report, render_report(recipe, run))
        run.record("report", options, inputs, [run.report], time.monotonic() - started)
    write_line(f"report: {run.report}")
