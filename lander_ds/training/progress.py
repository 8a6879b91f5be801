"""How far a training has come, besides its weights: what a checkpoint keeps so that training goes on as if nothing had
happened. The batches, learning rates and noise of a step follow from its number and the recipe alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

LOSS = "loss"
"""Of validations compared by loss; lower is better. Of every other criterion more is."""

GATE_STEPS = 32
"""So many gate values of a layer and pair are kept: exports that fold gates into weights take their mean."""


@dataclass
class Progress:
    """What the training loop remembers."""

    done: int = 0
    """Steps done, skipped ones included."""
    best: float | None = None
    """Lowest mean validation loss, or highest mean score."""
    criterion: str = LOSS
    """What `best` is one of: the loss, or a metric of translations."""
    without_gain: int = 0
    """Validations since then."""
    skipped: int = 0
    """Steps whose loss or gradients were not finite."""
    skipped_in_a_row: int = 0
    """Such steps since the last good one."""
    averaged: int = 0
    """Steps in the average of the weights."""
    gates: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Layer -> pair -> mean c (the share of the general banks) in each of the last `GATE_STEPS` steps with the pair."""

    def judge_by(self, criterion: str) -> None:
        """Validations are compared by `criterion`; what was the best by another one is forgotten."""
        if criterion != self.criterion:
            self.criterion, self.best, self.without_gain = criterion, None, 0

    def validated(self, mean: float) -> None:
        """Take note of a mean validation loss or score."""
        sign = 1.0 if self.criterion == LOSS else -1.0
        # No comparison with NaN is true: as the best it would stay for ever. Older checkpoints may hold one.
        known = sign * self.best if self.best is not None and math.isfinite(self.best) else math.inf
        if sign * mean < known:
            self.best, self.without_gain = mean, 0
        else:
            self.without_gain += 1

    def gated(self, means: Mapping[str, Mapping[str, float]]) -> None:
        """Take note of a step's mean gate values, layer -> pair -> c."""
        for layer, of_layer in means.items():
            for pair, mean in of_layer.items():
                if not math.isfinite(mean):
                    continue  # of a step that was skipped
                last = self.gates.setdefault(layer, {}).setdefault(pair, [])
                last.append(mean)
                del last[:-GATE_STEPS]

    def as_json(self) -> dict[str, Any]:
        """For state.json."""
        return asdict(self)
