"""The matrix of test sets and directions against systems: what the model learned, kept and forgot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from lander_ds.report.summary import SYSTEM_NAMES, number, p_value

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

    @property
    def gain(self) -> float | None:
        """chrF2 of the trained system over the untouched base."""
        before, after = (self.systems.get(name, {}).get("chrf") for name in ("base", "trained"))
        return None if before is None or after is None else after - before

    @property
    def p(self) -> float | None:
        """Of the gain."""
        return self.systems.get("trained", {}).get("p_chrf")


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


def set_tables(sets: Mapping[str, Any]) -> list[Table]:
    """The matrix, and the losses on plain text; nothing without test sets.

    Args:
        sets: `sets` of `scores.json`.
    """
    return [_matrix(sets), _losses(sets)] if sets else []


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


def _matrix(sets: Mapping[str, Any]) -> Table:
    systems = systems_of(sets)
    table = _table("chrF2 and off-target rate per test set; gain and p over base", "set", "direction")
    for system in systems:
        table.add_column(f"{SYSTEM_NAMES[system]}\nchrF", justify="right")
        table.add_column("off\n%", justify="right")
    table.add_column("gain\nchrF", justify="right", style="bold")
    table.add_column("p\nchrF", justify="right")
    for name, entry in sets.items():
        for row, line in enumerate(lines(entry)):
            cells = []
            for system in systems:
                figures = line.systems.get(system, {})
                off = figures.get("off_target")
                cells += [number(figures.get("chrf")), "-" if off is None else f"{100 * off:.0f}"]
            gain = number(line.gain, signed=True)
            table.add_row("" if row else name, line.name, *cells, gain, p_value(line.p))
        table.add_section()
    table.caption, table.caption_justify = "* not trained: runs on the general banks", "left"
    return table


def _losses(sets: Mapping[str, Any]) -> Table:
    table = _table("Loss on plain text (references alone)", "set", "language")
    systems = [
        system
        for system in SYSTEM_NAMES
        if any(system in of for entry in sets.values() for of in entry["monolingual"].values())
    ]
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
