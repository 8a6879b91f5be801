"""The report's plots, one function per concept. Shapes: M pairs, L decoder layers, f neurons per layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lander_ds.method.selection import Bank, Selection
from lander_ds.report.figures import (
    BANK_COLOURS,
    SEQUENTIAL,
    SYSTEM_COLOURS,
    colour_of,
    legend,
    legend_columns,
    new_figure,
    styled,
)
from lander_ds.report.summary import SYSTEM_NAMES

Records = Sequence[Mapping[str, Any]]
"""Lines of metrics.jsonl."""

PERCENTILES = (1, 10, 25, 50, 75, 90, 99, 100)
TOP_SHARE = 0.01
"""Share of neurons that counts as a pair's own in the overlap plot."""
MANY_CELLS = 12
"""A heat map with more rows or columns gets no numbers in its cells."""


@styled
def scores(pairs: Mapping[str, Mapping[str, Any]]) -> Figure:
    """chrF2 of every system and pair with 95 % confidence intervals. `pairs`: from scores.json."""
    systems = [name for name in SYSTEM_COLOURS if any(name in entry["systems"] for entry in pairs.values())]
    figure, (axes,) = new_figure(0.9 + 0.42 * len(pairs) * max(1, len(systems)) ** 0.6)
    height = 0.8 / max(1, len(systems))
    for number, system in enumerate(systems):
        entries = [entry["systems"].get(system, {}) for entry in pairs.values()]
        positions = np.arange(len(pairs)) + (number - (len(systems) - 1) / 2) * height
        values = [entry.get("chrf", np.nan) for entry in entries]
        errors = [entry.get("chrf_ci", 0.0) for entry in entries]
        error_style = {"ecolor": "#3d444d", "elinewidth": 1.0, "capsize": 2}
        axes.barh(
            positions,
            values,
            0.92 * height,
            xerr=errors,
            color=SYSTEM_COLOURS[system],
            label=SYSTEM_NAMES[system],
            error_kw=error_style,
        )
    axes.set_yticks(np.arange(len(pairs)), list(pairs))
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlim(left=0)
    axes.set_xlabel("chrF2")
    legend(axes)
    return figure


@styled
def relevance_by_layer(relevance: np.ndarray, pairs: Sequence[str], selected: Sequence[int]) -> Figure:
    """D per layer and pair [M, L - 1], the mean over pairs, and the selected layers shaded."""
    figure, (axes,) = new_figure(3.0)
    layers = np.arange(relevance.shape[1])
    for layer in selected:
        axes.axvspan(layer - 0.5, layer + 0.5, color="#f3ead2", lw=0)
    for row, pair in enumerate(pairs):
        axes.plot(layers, relevance[row], marker="o", ms=3, lw=1.2, color=colour_of(pair, pairs), label=pair)
    if len(pairs) > 1:
        axes.plot(layers, relevance.mean(0), color="#22272e", lw=2, ls=(0, (4, 1.5)), label="mean")
    axes.set_xlabel("decoder layer (shaded: selected)")
    axes.set_ylabel("D")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(axes)
    return figure


@styled
def awareness_by_layer(phi: np.ndarray, pairs: Sequence[str], selected: Sequence[int]) -> Figure:
    """Total awareness of every layer and pair: phi [M, L, f] summed over neurons; selected layers marked."""
    total = phi.sum(-1)
    figure, (axes,) = new_figure(0.9 + 0.26 * max(4, len(pairs)))
    axes.set_title("sum over the layer's neurons")
    _heat_map(axes, total, rows=list(pairs), columns=_layer_names(phi.shape[1]), label="awareness", log=True)
    _mark_columns(axes, selected, len(pairs))
    axes.set_xlabel("decoder layer (marked: selected)")
    return figure


@styled
def awareness_percentiles(phi: np.ndarray) -> Figure:
    """How unequal the neurons of a layer are: percentiles over neurons of phi [M, L, f], mean over pairs."""
    values = np.percentile(phi, PERCENTILES, axis=-1).mean(axis=1)
    figure, (axes,) = new_figure(2.9)
    names = ["max" if q == 100 else f"{q} %" for q in PERCENTILES]
    axes.set_title("percentiles over the layer's neurons, mean over pairs")
    _heat_map(axes, values[::-1], names[::-1], _layer_names(phi.shape[1]), "awareness", log=True)
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("percentile")
    return figure


@styled
def neuron_overlap(phi: np.ndarray, pairs: Sequence[str]) -> Figure:
    """How alike the pairs' neurons are: overlap of the most aware 1 %, correlation of log awareness."""
    flat = phi.reshape(len(pairs), -1)
    figure, axes = new_figure(3.1, columns=2)
    panels = (
        ("Jaccard, most aware 1 %", jaccard_of_top(flat, TOP_SHARE)),
        ("correlation of log awareness", np.corrcoef(np.log(flat + 1e-30)).reshape(len(pairs), -1)),
    )
    for panel, (title, matrix) in zip(axes, panels, strict=True):
        panel.set_title(title)
        _heat_map(panel, matrix, list(pairs), list(pairs), label="", numbers=True, limits=(0, 1))
        panel.tick_params(axis="x", rotation=90 if len(pairs) > 3 else 0)
        panel.set_aspect("equal")
    return figure


def jaccard_of_top(awareness: np.ndarray, share: float) -> np.ndarray:
    """[M, M] overlap |A and B| / |A or B| of every pair's `share` most aware neurons; awareness [M, n]."""
    count = max(1, round(share * awareness.shape[1]))
    top = [set(np.argpartition(row, -count)[-count:].tolist()) for row in awareness]
    return np.array([[len(a & b) / len(a | b) for b in top] for a in top])


@styled
def bank_sizes(selection: Selection) -> Figure:
    """Neurons per bank in every selected layer."""
    groups = {bank.group: bank for layer in selection.layers for bank in layer.banks}
    figure, (axes,) = new_figure(0.9 + 0.34 * len(selection.layers))
    positions = np.arange(len(selection.layers))
    left = np.zeros(len(selection.layers))
    kinds = ("general", "specific", "frozen")
    labelled: set[str] = set()

    def order(bank: Bank) -> tuple[int, int, list[int]]:
        return kinds.index(bank.kind), len(bank.owners), [selection.pairs.index(pair) for pair in bank.owners]

    for bank in sorted(groups.values(), key=order):
        sizes = [sum(b.size for b in layer.banks if b.group == bank.group) for layer in selection.layers]
        if bank.kind == "specific":
            alone = len(bank.owners) == 1
            colour = colour_of(bank.owners[0], selection.pairs) if alone else "#8a929c"
            label = bank.owners[0] if alone else "several pairs"
        else:
            colour, label = BANK_COLOURS[bank.kind], bank.kind
        shown = "_nolegend_" if label in labelled else label
        labelled.add(label)
        axes.barh(positions, sizes, 0.72, left=left, color=colour, edgecolor="white", lw=0.6, label=shown)
        left += sizes
    axes.set_yticks(positions, [f"layer {layer.layer}" for layer in selection.layers])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlim(0, selection.neurons)
    axes.set_xlabel("neurons")
    legend(axes)
    return figure


@styled
def losses(steps: Records, validations: Records, pairs: Sequence[str]) -> Figure:
    """Training loss in total and per pair (smoothed), and validation loss per pair."""
    figure, axes = new_figure(5.0, rows=2, sharex=True)
    at = np.array([record["step"] for record in steps])
    total = np.array([record["loss"] for record in steps], dtype=float)
    axes[0].set_title("training loss per target token")
    axes[0].plot(at, total, color="#c3c9d0", lw=0.8, label="each step")
    axes[0].plot(at, smoothed(total), color="#22272e", lw=2, label="smoothed")
    axes[0].legend(loc="upper right")
    axes[1].set_title("per pair: training (smoothed, thin), validation (dots)")
    for pair in pairs:
        colour = colour_of(pair, pairs)
        values = np.array([record["loss_per_pair"].get(pair, np.nan) for record in steps], dtype=float)
        present = np.isfinite(values)
        if present.any():
            axes[1].plot(at[present], smoothed(values[present]), color=colour, lw=1.2, label=pair)
        valid = [(r["step"], r["valid_loss"][pair]) for r in validations if pair in r["valid_loss"]]
        if valid:
            axes[1].plot(*zip(*valid, strict=True), color=colour, marker="o", ms=4, lw=0.8, ls=":")
    axes[1].legend(loc="upper right", ncols=1 + (len(pairs) > 5))
    axes[1].set_xlabel("step")
    return figure


@styled
def valid_scores(validations: Records, metric: str, pairs: Sequence[str]) -> Figure:
    """Scores of the validation sentences in a metric, per pair and as the mean over pairs."""
    figure, axes = new_figure(2.6)
    at = [record["step"] for record in validations]
    for pair in pairs:
        scores = [record[f"valid_{metric}"].get(pair, np.nan) for record in validations]
        axes[0].plot(at, scores, color=colour_of(pair, pairs), marker="o", ms=3, lw=1.2, label=pair)
    means = [record[f"valid_{metric}_mean"] for record in validations]
    axes[0].plot(at, means, color="#22272e", marker="o", ms=4, lw=2, label="mean")
    axes[0].legend(loc="best", ncols=1 + (len(pairs) > 5))
    axes[0].set_xlabel("step")
    return figure


@styled
def learning_rates(steps: Records) -> Figure:
    """Learning rate per parameter group (equal ones drawn once), and the gradient norm before clipping."""
    figure, axes = new_figure(4.2, rows=2, sharex=True)
    at = [record["step"] for record in steps]
    same: dict[tuple[float, ...], list[str]] = {}
    for group in steps[0]["lr"]:
        same.setdefault(tuple(record["lr"].get(group, np.nan) for record in steps), []).append(group)
    axes[0].set_title("learning rate")
    for values, groups in same.items():
        kinds = list(dict.fromkeys(group.partition(":")[0] for group in groups))
        axes[0].plot(at, values, label=", ".join(kinds))
    axes[0].legend(loc="best")
    axes[0].ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
    norms = np.array([record["grad_norm"] for record in steps], dtype=float)
    axes[1].set_title("gradient norm")
    axes[1].plot(at, norms, color="#c3c9d0", lw=0.8)
    axes[1].plot(at, smoothed(norms), color="#22272e", lw=2)
    axes[1].set_ylim(bottom=0)
    axes[1].set_xlabel("step")
    return figure


@styled
def gates_over_steps(steps: Records, pairs: Sequence[str]) -> Figure:
    """Mean gate c per layer and pair during training; 0.5 leaves general and specific banks as they were."""
    layers = gated_layers(steps)
    columns = min(2, len(layers))
    rows = -(-len(layers) // columns)
    figure, axes = new_figure(0.5 + 1.7 * rows, rows, columns, sharex=True, sharey=True)
    at = [record["step"] for record in steps]
    for panel, layer in zip(axes, layers, strict=False):
        panel.set_title(f"layer {layer}")
        panel.axhline(0.5, color="#8a929c", lw=0.8, ls="--")
        for pair in pairs:
            values = [record["gates"].get(layer, {}).get(pair, np.nan) for record in steps]
            panel.plot(at, values, lw=1.2, color=colour_of(pair, pairs), label=pair)
    for panel in axes[len(layers) :]:
        panel.set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=legend_columns(labels))
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("mean gate c", fontsize=9)
    return figure


@styled
def final_gates(steps: Records, pairs: Sequence[str]) -> Figure:
    """Mean gate c per layer and pair over the last tenth of the steps."""
    layers = gated_layers(steps)
    last = steps[-max(1, len(steps) // 10) :]
    values = np.array(
        [[_mean(r["gates"].get(layer, {}).get(pair) for r in last) for layer in layers] for pair in pairs]
    )
    figure, (axes,) = new_figure(1.0 + 0.28 * max(3, len(pairs)))
    span = max(0.02, float(np.nanmax(np.abs(values - 0.5))) if np.isfinite(values).any() else 0.02)
    limits = (0.5 - span, 0.5 + span)
    _heat_map(
        axes, values, list(pairs), layers, "mean c", numbers=True, limits=limits, colours="RdBu", digits=3
    )
    axes.set_xlabel("decoder layer (blue: general banks stronger, red: specific banks stronger)")
    return figure


def gated_layers(steps: Records) -> list[str]:
    """Layers that have gate statistics, ascending."""
    return sorted({layer for record in steps for layer in record.get("gates", {})}, key=int)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Centred moving average over a twentieth of the run, narrower at the ends; same shape."""
    window = max(1, len(values) // 20) | 1
    kernel = np.ones(window)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def _mean(values: Any) -> float:
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present else float("nan")


def _layer_names(count: int) -> list[str]:
    return [str(layer) for layer in range(count)]


def _mark_columns(axes: Axes, columns: Sequence[int], rows: int) -> None:
    for column in columns:
        axes.plot(column, rows - 0.42, marker="^", ms=5, color="#d55e00", clip_on=False, zorder=5)


def _heat_map(
    axes: Axes,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
    *,
    numbers: bool = False,
    log: bool = False,
    limits: tuple[float, float] | None = None,
    colours: str = SEQUENTIAL,
    digits: int = 2,
) -> None:
    norm = LogNorm() if log and (values > 0).any() else Normalize(*(limits or (None, None)))
    image = axes.imshow(values, aspect="auto", cmap=colours, norm=norm)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_yticks(range(len(rows)), rows)
    thin = max(1, len(columns) // 20)
    axes.set_xticks(range(0, len(columns), thin), columns[::thin])
    if label:
        bar = axes.figure.colorbar(image, ax=axes, pad=0.02, fraction=0.05)
        bar.set_label(label)
        bar.outline.set_visible(False)
    if numbers and max(values.shape) <= MANY_CELLS:
        for row, column in np.ndindex(*values.shape):
            if np.isfinite(values[row, column]):
                red, green, blue, _ = image.cmap(image.norm(values[row, column]))
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
                text = f"{values[row, column]:.{digits}f}"
                axes.text(
                    column,
                    row,
                    text,
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if dark else "#22272e",
                )
