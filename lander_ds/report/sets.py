"""The matrix of test sets and directions against systems: what the model learned, kept and forgot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from lander_ds.report.summary import SYSTEM_NAMES, further_metrics, number, p_value

GROUPS = {"trained": "mean", "untrained": "mean *"}
"""Directions that are and are not among `data.pairs` -> what their means are called."""


@dataclass(frozen=True)
class Line:
    """A row of the matrix."""

    name: str
    """A direction or `mean`, marked if it was not trained."""
    mean: bool
    """Whether it holds means."""
    systems: Mapping[str, Mapping[str, Any]]
    """System -> figures as in `scores.json`; a system that did not translate it is not there."""

    def gain(self, metric: str) -> float | None:
        """What the trained system scores more than the untouched base."""
        before, after = (self.systems.get(name, {}).get(metric) for name in ("base", "trained"))
        return None if before is None or after is None else after - before

    def p(self, metric: str) -> float | None:
        """Of the gain."""
        return self.systems.get("trained", {}).get(f"p_{metric}")


def lines(entry: Mapping[str, Any]) -> Iterator[Line]:
    """The rows of one test set: trained directions and their mean, untrained directions and theirs.

    Args:
        entry: of `sets` in `scores.json`.
    """
    for group, title in GROUPS.items():
        trained = group == "trained"
        own = {pair: e for pair, e in entry["directions"].items() if e["trained"] is trained}
        for pair, of_pair in own.items():
            yield Line(pair if trained else f"{pair} *", False, of_pair["systems"])
        if len(own) > 1:
            yield Line(title, True, entry["mean"][group])


def systems_of(sets: Mapping[str, Any]) -> list[str]:
    """The systems that translated anything, in the order of tables."""
    entries = [direction["systems"] for entry in sets.values() for direction in entry["directions"].values()]
    return [system for system in SYSTEM_NAMES if any(system in entry for entry in entries)]


def measured_systems(sets: Mapping[str, Any]) -> list[str]:
    """The systems with losses on plain text, in the order of tables."""
    entries = [of for entry in sets.values() for of in entry["monolingual"].values()]
    return [system for system in SYSTEM_NAMES if any(system in entry for entry in entries)]


def further_of_sets(sets: Mapping[str, Any], neural: Sequence[str]) -> dict[str, int]:
    """`further_metrics` of all sets together."""
    entries = {
        f"{name} {pair}": of for name, entry in sets.items() for pair, of in entry["directions"].items()
    }
    return further_metrics(entries, neural)


def set_tables(sets: Mapping[str, Any], neural: Sequence[str]) -> list[Table]:
    """The matrix, one per further metric, and the losses on plain text; nothing without test sets.

    Args:
        sets: `sets` of `scores.json`.
        neural: names of the neural metrics.
    """
    if not sets:
        return []
    further = further_of_sets(sets, neural)
    matrices = [_matrix(sets, name, name, digits, off_target=False) for name, digits in further.items()]
    return [_matrix(sets, "chrf", "chrF", 1, off_target=True), *matrices, _losses(sets)]


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        # Three systems fit into 80 columns only just.
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    for column in columns:
        table.add_column(column)
    return table


def _matrix(sets: Mapping[str, Any], metric: str, label: str, digits: int, off_target: bool) -> Table:
    systems = systems_of(sets)
    what = "chrF2 and off-target rate" if off_target else label
    table = _table(f"{what} per test set; gain and p over base", "set", "direction")
    for system in systems:
        table.add_column(f"{SYSTEM_NAMES[system]}\n{label}", justify="right")
        if off_target:
            table.add_column("off\n%", justify="right")
    table.add_column(f"gain\n{label}", justify="right", style="bold")
    table.add_column(f"p\n{label}", justify="right")
    for name, entry in sets.items():
        for row, line in enumerate(lines(entry)):
            cells = []
            for system in systems:
                figures = line.systems.get(system, {})
                cells.append(number(figures.get(metric), digits))
                if off_target:
                    off = figures.get("off_target")
                    cells.append("-" if off is None else f"{100 * off:.0f}")
            gain = number(line.gain(metric), digits, signed=True)
            table.add_row("" if row else name, line.name, *cells, gain, p_value(line.p(metric)))
        table.add_section()
    table.caption, table.caption_justify = "* not trained: runs on the general banks", "left"
    return table


def _losses(sets: Mapping[str, Any]) -> Table:
    table = _table("Loss on plain text (references alone)", "set", "language")
    systems = measured_systems(sets)
    for system in systems:
        table.add_column(f"{SYSTEM_NAMES[system]}\nnats/token", justify="right")
        table.add_column("\nbits/byte", justify="right")
    for name, entry in sets.items():
        for row, (language, by_system) in enumerate(entry["monolingual"].items()):
            figures = [by_system.get(system, {}) for system in systems]
            cells = [_loss(of.get(key)) for of in figures for key in ("nats_per_token", "bits_per_byte")]
            table.add_row("" if row else name, language, *cells)
        table.add_section()
    return table


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
