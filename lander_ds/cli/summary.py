"""`lander summary`."""

from __future__ import annotations

import argparse
import json

from lander_ds.common import console
from lander_ds.common.run_directory import RunDirectory
from lander_ds.report.sets import set_tables
from lander_ds.report.summary import summarise, summary_table


def run(arguments: argparse.Namespace) -> None:
    """Print the figures of a run."""
    figures = summarise(RunDirectory(arguments.run_dir))
    if arguments.json:
        console.write_line(json.dumps(figures, indent=2, ensure_ascii=False))
    else:
        console.stdout.print(summary_table(figures))
        for table in set_tables(figures["sets"], figures["neural"]):
            console.stdout.print(table)
