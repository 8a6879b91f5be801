"""Stage report: everything the run has written so far -> report.html."""

from __future__ import annotations

from lander_ds.checkpoint.choice import as_trained, description, warn_of_changes
from lander_ds.common.console import write_line
from lander_ds.common.files import file_hash, json_hash, write_text
from lander_ds.config.loading import section
from lander_ds.data.prepared import STATISTICS, replay_directory
from lander_ds.distributed.start import Start
from lander_ds.inference.provenance import data_hash
from lander_ds.report.page import render_report
from lander_ds.stages.stage import Part, Result, Stage


def _parts(start: Start) -> list[Part]:
    """One part: `report.html`, from whatever stages have run; it says what is missing.

    Raises:
        ArtefactError: no stage has run, or an artefact is damaged.
    """
    recipe, run = start.recipe, start.run
    sources = [
        *(directory / STATISTICS for directory in (run.data, replay_directory(run))),
        run.awareness,
        run.selection,
        run.metrics,
        run.training_summary,
        run.scores,
        *sorted(run.translations.glob("*/*.jsonl")),
    ]
    options = section(
        recipe,
        "run_dir",
        "model",
        "data",
        "select",
        "routing",
        "train",
        "translate",
        "evaluate",
        "score",
        "seed",
    )
    inputs = {run.relative(path): file_hash(path) for path in sources if path.exists()}
    state = description(run.checkpoints, recipe.translate.checkpoint)
    if state is not None:
        inputs["checkpoint"] = json_hash(dict(state))
        warn_of_changes(state, recipe, run, data_hash(start))

    def report() -> Result:
        write_text(run.report, render_report(recipe if state is None else as_trained(recipe, state), run))
        return Result([run.report])

    return [Part("report", options, inputs, report, show=lambda: write_line(f"report: {run.report}"))]


STAGE = Stage("report", _parts)
run = STAGE.run
