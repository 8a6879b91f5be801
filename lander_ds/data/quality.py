"""Sentence pairs judged by a model of translation quality (`data.filters.quality`), after all other filters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from lander_ds.config.schema.types import Split
from lander_ds.data.sources.rows import Rejection, Row

TOGETHER = 8192
"""Rows that are judged at a time."""
JUDGED: tuple[Split, ...] = ("train", "detect")
"""Splits that are filtered: a test stays what it is."""


@dataclass(frozen=True)
class Judge:
    """A metric and what it lets pass."""

    name: str
    """Its key in `data.filters.quality`."""
    minimum: float
    """The lowest score that passes."""
    scores: Callable[[Sequence[Row]], Sequence[float]]
    """Of rows, in their order."""


def judged(
    rows: Iterable[Row], judges: Sequence[Judge], reject: Callable[[Rejection], object]
) -> Iterator[Row]:
    """The rows that every judge lets pass, in their order; the others go to `reject`."""
    waiting = iter(rows)
    while together := list(islice(waiting, TOGETHER)):
        for judge in judges:
            passed = []
            for row, score in zip(together, judge.scores(together), strict=True):
                if score >= judge.minimum:
                    passed.append(row)
                else:
                    text = f"{judge.name} {score:.4f}: {row.src} | {row.tgt}"
                    reject(Rejection(row.file, row.line, "low_quality", text))
            together = passed
        yield from together
