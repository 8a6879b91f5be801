"""`lander plan`: the arguments, the table, the plot, and the comparison with real tensors."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from lander_ds.common import console
from lander_ds.common.errors import ConfigError
from lander_ds.config.recipe import Recipe

if TYPE_CHECKING:
    from rich.table import Table

    from lander_ds.cluster.planning.validation import Case

SUMMARY = "what fits on a cluster, and how long a step takes there; needs no weights and no GPU"

OFF = 2
"""Exit code when a prediction is too far from what was measured."""

TABLE_WIDTH = 110

Load = Callable[[argparse.Namespace], Recipe]
"""The checked recipe of `--recipe` and `--set`."""


def add_arguments(parser: argparse.ArgumentParser, load: Load) -> None:
    """Everything but --recipe and --set."""
    parser.add_argument(
        "--cluster", type=Path, metavar="FILE", help="the machines (examples/clusters/*.yaml)"
    )
    parser.add_argument(
        "--json", action="store_true", help="as JSON, for programs, with every stage of every plan"
    )
    parser.add_argument(
        "--all", action="store_true", help="every number of stages, not only the best of each JSON"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw speed and memory over 1, 2, 4, ... machines"
    )
    parser.add_argument(
        "--nodes", type=_count, metavar="N", help="most machines in the plot (default: 8, or the cluster's)"
    )
    parser.add_argument(
        "--example-tokens",
        type=_count,
        default=96,
        metavar="N",
        help="average tokens of an example, prompt and target (default: 96)",
    )
    parser.add_argument(
        "--target-share",
        type=_share,
        default=0.5,
        metavar="SHARE",
        help="target tokens over all tokens (default: 0.5)",
    )
    parser.add_argument(
        "--validate",
        action="store_true",
        help="instead: train small models on CPU ranks in every topology and compare predictions with real tensors",
    )
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="with --validate: a model of yours, with weights"
    )
    parser.set_defaults(command=lambda arguments: _run(arguments, load), parser=parser)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError("must be above 0 and at most 1")
    return value


def _run(arguments: argparse.Namespace, load: Load) -> None:
    if arguments.validate:
        _validate(arguments)
        return
    if arguments.recipe is None or arguments.cluster is None:
        arguments.parser.error("--recipe FILE and --cluster FILE are needed, or --validate")
    from lander_ds.cluster.planning.cluster import load_cluster
    from lander_ds.cluster.planning.plan import Planner, best, best_of_each, over_nodes
    from lander_ds.cluster.planning.report import memory_table, model_lines, save_plot, speed_table
    from lander_ds.cluster.planning.workload import Workload

    _check_plot(arguments.plot)
    cluster = load_cluster(arguments.cluster)
    planner = Planner(load(arguments), Workload(arguments.example_tokens, arguments.target_share))
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
    from lander_ds.cluster.planning.validation import as_json, validate

    cases = validate(arguments.model)
    if arguments.json:
        console.write_line(as_json(cases))
    else:
        _console().print(_case_table(cases))
    if not all(case.within for case in cases):
        sys.exit(OFF)


def _case_table(cases: Sequence[Case]) -> Table:
    from rich.table import Table

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
