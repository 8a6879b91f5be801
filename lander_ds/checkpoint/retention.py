"""Which checkpoints are kept."""

from __future__ import annotations

import math
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
    """The one with the lowest mean validation loss."""


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
    """The step with the lowest finite mean validation loss, where any was measured; of equal ones the first."""
    losses = {}
    for step in saved:
        try:
            loss = load(directory / f"step-{step}").state.get("valid_loss")
        except ArtefactError:
            continue
        if loss is not None and math.isfinite(loss):
            losses[step] = loss
    return {min(losses, key=lambda step: (losses[step], step))} if losses else set()
