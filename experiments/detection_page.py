"""What docs/evidence.md says of the detection study: tables and two pictures, from results/detection/detection.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from lander_ds.report.figures import colour_of, legend, new_figure, styled, svg

Results = Mapping[str, Any]


def as_svg(figure: Figure) -> str:
    """The figure as a file, without the blanks that matplotlib leaves at line ends."""
    return "\n".join(line.rstrip() for line in svg(figure).decode().splitlines()) + "\n"


@styled
def knock_out_figure(results: Results) -> Figure:
    """Per criterion a matrix: row, whose neurons are off; column, whose loss rises; nats per target token."""
    pairs, rise = results["pairs"], results["knock_out"]["rise"]
    figure, panels = new_figure(5.6, rows=2, columns=2)
    matrices = {name: matrix(results, name) for name in rise}
    # Shared colours, so that panels can be compared; the largest rises would make all others look alike.
    norm = Normalize(0, float(np.percentile(np.concatenate([m.ravel() for m in matrices.values()]), 95)))
    for axes, (name, values) in zip(panels, matrices.items(), strict=True):
        axes.imshow(values, aspect="auto", cmap="viridis", norm=norm)
        axes.set_title(f"off: 1 % {name}" if name != "random" else "off: 1 % at random")
        axes.grid(False)
        axes.set_yticks(range(len(pairs)), pairs)
        axes.set_xticks(range(len(pairs)), [pair.partition("-")[2] for pair in pairs])
        for row, column in np.ndindex(*values.shape):
            light = norm(values[row, column]) < 0.6
            text = f"{values[row, column]:.2f}"
            axes.text(
                column, row, text, ha="center", va="center", size=7, color="white" if light else "black"
            )
    return figure


@styled
def stability_figure(results: Results) -> Figure:
    """Agreement of the awareness of few sentences with that of others, per direction."""
    pairs, curve = results["pairs"], results["stability"]["curve"]
    figure, panels = new_figure(3.0, columns=2)
    titles = {"spearman": "rank correlation, all neurons", "top_shared": "top 1 % found again"}
    for axes, (figure_name, title) in zip(panels, titles.items(), strict=True):
        for pair in pairs:
            points = [(one["sentences"], one[figure_name][pair]) for one in curve]
            axes.plot(*zip(*points, strict=True), marker="o", ms=3, color=colour_of(pair, pairs), label=pair)
        axes.set_xscale("log", base=2)
        sizes = [one["sentences"] for one in curve]
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_xlabel("sentences per direction")
        axes.set_title(title, pad=30)
        axes.set_ylim(top=1)
    legend(panels[0])
    return figure


def matrix(results: Results, criterion: str) -> np.ndarray:
    """[M, M] rise of the loss of a direction (column) without the neurons of another (row)."""
    pairs, rise = results["pairs"], results["knock_out"]["rise"][criterion]
    return np.array([[rise[off][pair] for pair in pairs] for off in pairs])


def knock_out_table(results: Results) -> str:
    """Per criterion: mean rise of the direction's own loss and of the others'."""
    lines = [
        "| 1 % of all neurons off | rise of the direction's own loss | of the other directions' | own over others |",
        "| --- | --- | --- | --- |",
    ]
    for name in results["knock_out"]["rise"]:
        values = matrix(results, name)
        own = float(np.diag(values).mean())
        others = float(values[~np.eye(len(values), dtype=bool)].mean())
        ratio = f"{own / others:.1f}" if others > 0.005 else "–"
        lines.append(f"| {name} | {own:+.2f} | {others:+.2f} | {ratio} |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Smallest and largest of some figures."""
    return f"{min(values):.2f} to {max(values):.2f}"


def facts(results: Results) -> dict[str, Any]:
    """What the page's sentences need."""
    halves, shared = results["stability"]["halves"], results["overlap"]["shared"]
    neurons = results["truth"]["neurons"]
    return {
        "date": results["date"],
        "table": knock_out_table(results),
        "halves": spread(list(halves["spearman"].values())),
        "halves_top": spread(list(halves["top_shared"].values())),
        "curve": [
            {
                "sentences": one["sentences"],
                "spearman": spread(list(one["spearman"].values())),
                "top": spread(list(one["top_shared"].values())),
            }
            for one in results["stability"]["curve"]
        ],
        "truth": spread(list(results["truth"]["spearman"].values())),
        "sampled": len(neurons),
        "overlap": spread([value for row in shared.values() for value in row.values()]),
        "share": results["overlap"]["share"],
        "sentences": results["knock_out"]["sentences"],
    }
