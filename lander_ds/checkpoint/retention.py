"""Which checkpoints are kept."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lander_ds.checkpoint.checkpoint import load, steps
from lander_ds.common.errors import ArtefactError


@dataclass(frozen=True)
class Retention:
    """What is kept besides the newest checkpoint; everything when `last` is 0."""

    last: int = 0
    """The newest so many; 0 keeps all."""
    every: int = 0
    """Those whose step is a multiple of this; 0: none for that reason."""
    best: bool = True
    """The one that `best` finds."""


def superfluous(directory: Path, retention: Retention, written: int) -> list[Path]:
    """Directories that may be deleted once step `written` is there.

    Those of later steps neither count nor go: a resume has passed over them as damaged.
    """
    saved = [step for step in steps(directory) if step <= written]
    if retention.last == 0:
        return []
    kept = set(saved[-retention.last :])
    if retention.every:
        kept |= {step for step in saved if step % retention.every == 0}
    if retention.best:
        kept |= best(directory, saved)
    return [directory / f"step-{step}" for step in saved if step not in kept]


def best(directory: Path, saved: list[int]) -> set[int]:
    """The best step by `train.keep_best` of the newest: that with the highest mean score of the validation sentences, or
    with the lowest mean validation loss. Only finite figures count; of equal ones the first. None where nothing was
    measured."""
    states = {}
    for step in saved:
        with suppress(ArtefactError):
            states[step] = load(directory / f"step-{step}").state
    if not states:
        return set()
    criterion = states[max(states)].get("train", {}).get("keep_best")
    by_loss = criterion in (None, True, False, "loss", "off")  # earlier versions wrote a boolean, or nothing
    key, sign = ("valid_loss", 1.0) if by_loss else (f"valid_{criterion}", -1.0)
    figures = {step: state[key] for step, state in states.items() if state.get(key) is not None}
    costs = {step: sign * figure for step, figure in figures.items() if math.isfinite(figure)}
    return {min(costs, key=lambda step: (costs[step], step))} if costs else set()
