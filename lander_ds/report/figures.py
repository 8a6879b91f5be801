"""Style and file format of the report's figures: colours, sizes, SVG as a data URI."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

P = ParamSpec("P")

WIDTH = 5.6
"""Inches. Narrow, so that text stays legible where a phone shrinks the figure to its width."""

SYSTEM_COLOURS = {
    "baseline": "#d9b26f",
    "base": "#b9c0c9",
    "fewshot": "#7fa6d6",
    "trained": "#1f6f8b",
    "trained_fewshot": "#123f52",
}
BANK_COLOURS = {"general": "#4b7f9e", "frozen": "#d9dde2"}
SEQUENTIAL = "viridis"
# Distinguishable with colour vision deficiencies (Okabe and Ito, without yellow), then darker variants.
_PAIR_COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#e69f00",
    "#5b3a8e",
    "#7a5c2e",
    "#444444",
    "#8fbf3f",
)

STYLE = {
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a929c",
    "axes.labelcolor": "#3d444d",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e9ed",
    "grid.linewidth": 0.7,
    "xtick.color": "#59626d",
    "ytick.color": "#59626d",
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "lines.linewidth": 1.5,
    "svg.hashsalt": "lander",
}


def colour_of(pair: str, pairs: Sequence[str]) -> str:
    """The colour of a pair: the same in every figure."""
    return _PAIR_COLOURS[list(pairs).index(pair) % len(_PAIR_COLOURS)]


def styled(function: Callable[P, Figure]) -> Callable[P, Figure]:
    """Make a plot function draw in the report's style."""

    @wraps(function)
    def draw(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with mpl.rc_context(STYLE):
            return function(*args, **kwargs)

    return draw


def new_figure(height: float, rows: int = 1, columns: int = 1, **arguments: Any) -> tuple[Figure, list[Axes]]:
    """A figure of the report's width and its axes, row by row.

    Args:
        height: inches.
        rows: rows of axes.
        columns: columns of axes.
        arguments: for `Figure.subplots`.
    """
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **arguments).flat)


def legend(axes: Axes) -> None:
    """A legend above the axes, where it does not cover the data, in as many columns as fit."""
    labels = axes.get_legend_handles_labels()[1]
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=legend_columns(labels), borderaxespad=0.2)


def legend_columns(labels: Sequence[str]) -> int:
    """Columns of a legend as wide as the figure: about 78 characters, of which each marker takes 6."""
    return max(1, min(len(labels), 78 // (6 + max(map(len, labels), default=0))))


def svg(figure: Figure) -> bytes:
    """The figure as a file; equal figures give equal bytes."""
    stream = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return stream.getvalue()


def data_uri(figure: Figure) -> str:
    """The figure as `data:image/svg+xml;base64,...`."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg(figure)).decode()
