"""`lander plan`: the tables, the plot, and the comparison with real tensors."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lander_ds.cluster.planning.cluster import load_cluster
from lander_ds.cluster.planning.plan import Planner, best, best_of_each, over_nodes
from lander_ds.cluster.planning.report import memory_table, model_lines, save_plot, speed_table
from lander_ds.cluster.planning.validation import Case, as_json, validate
from lander_ds.cluster.planning.workload import Workload
from lander_ds.common import console
from lander_ds.common.errors import ConfigError, ExitCode
from lander_ds.config.deepspeed_json import check_deepspeed_json
from lander_ds.preflight.recipe import load_checked

TABLE_WIDTH = 110


def run(arguments: argparse.Namespace) -> None:
    """Print what fits, and how fast it is; or compare predictions with real tensors."""
    if arguments.validate:
        _validate(arguments)
        return
    if arguments.recipe is None or arguments.cluster is None:
        arguments.parser.error("--recipe FILE and --cluster FILE are needed, or --validate")
    _check_plot(arguments.plot)
    cluster = load_cluster(arguments.cluster)
    recipe = load_checked(arguments.recipe, arguments.overrides, "plan")
    check_deepspeed_json(recipe)
    planner = Planner(recipe, Workload(arguments.example_tokens, arguments.target_share))
    plans = planner.plans(cluster)
    shown = sorted(plans, key=lambda plan: plan.step_seconds) if arguments.all else best_of_each(plans)
    fastest = best(plans)
    if arguments.json:
        result = {
            "cluster": vars(cluster),
            "best": None if fastest is None else f"{fastest.name} {fastest.stages}x{fastest.data_ranks}",
            "plans": [plan.as_json() for plan in plans],
        }
        console.write_line(json.dumps(result, indent=2))
    else:
        for line in model_lines(planner, shown):
            console.write_line(line)
        wide = _console()
        wide.print(memory_table(shown, cluster))
        wide.print(speed_table(shown))
    if arguments.plot is not None:
        largest = arguments.nodes or max(8, cluster.nodes)
        save_plot(over_nodes(planner, cluster, largest), cluster, arguments.plot)


def _console() -> Console:
    """Standard output; into a file or a pipe rich would write 80 columns, which cuts the headings."""
    return Console(highlight=False, width=max(console.stdout.width, TABLE_WIDTH))


def _check_plot(path: Path | None) -> None:
    if path is not None and path.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--plot {path}: the name says what is drawn; end it in .png, .svg or .pdf")


def _validate(arguments: argparse.Namespace) -> None:
    cases = validate(arguments.model)
    if arguments.json:
        console.write_line(as_json(cases))
    else:
        _console().print(_case_table(cases))
    if not all(case.within for case in cases):
        sys.exit(ExitCode.WRONG_INPUT)


def _case_table(cases: Sequence[Case]) -> Table:
    table = Table(title="Bytes, predicted and measured")
    table.add_column("case")
    table.add_column("quantity")
    for heading in ("predicted", "measured", "off by"):
        table.add_column(heading, justify="right")
    for case in cases:
        colour = "" if case.within else "[red]"
        table.add_row(
            case.case,
            case.quantity,
            f"{case.predicted:,}",
            f"{case.measured:,}",
            f"{colour}{100 * case.error:.2f} %",
        )
    return table
