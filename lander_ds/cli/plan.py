"""`lander plan`: the tables and the plot."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from lander_ds.cluster.planning.cluster import load_cluster
from lander_ds.cluster.planning.plan import Planner, best, best_of_each, over_nodes
from lander_ds.cluster.planning.report import memory_table, model_lines, save_plot, speed_table
from lander_ds.cluster.planning.workload import Workload
from lander_ds.common import console
from lander_ds.common.errors import ConfigError
from lander_ds.config.deepspeed_json import check_deepspeed_json
from lander_ds.preflight.recipe import load_checked

TABLE_WIDTH = 110


def run(arguments: argparse.Namespace) -> None:
    """Print what fits, and how fast it is."""
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
            "best": None if fastest is None else f"{fastest.label} {fastest.stages}x{fastest.data_ranks}",
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
