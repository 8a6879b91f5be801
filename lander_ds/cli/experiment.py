"""`lander experiment`."""

from __future__ import annotations

import argparse
from pathlib import Path

from lander_ds.common.console import stdout, write_line
from lander_ds.common.files import write_json, write_text
from lander_ds.experiment.grid import load_experiment
from lander_ds.experiment.results import RESULTS_FILE, assemble
from lander_ds.experiment.runner import Runner
from lander_ds.experiment.table import as_csv, as_html, as_markdown


def run(arguments: argparse.Namespace) -> None:
    """Run an experiment's cells, list them, or render what is finished."""
    experiment = load_experiment(arguments.experiment)
    runner = Runner(experiment, Path(experiment.recipe), arguments.slots, arguments.only)
    if arguments.list:
        for cell in runner.plan():
            write_line(f"{'finished' if runner.is_finished(cell) else 'to do':8}  {cell.name}")
        return
    if not arguments.table:
        runner.run()
    results = assemble(experiment, arguments.experiment.stem, runner.out)
    write_json(runner.out / RESULTS_FILE, results)
    for suffix, render in (("md", as_markdown), ("csv", as_csv), ("html", as_html)):
        write_text(runner.out / f"table.{suffix}", render(results))
    stdout.print(as_markdown(results), soft_wrap=True, markup=False)
