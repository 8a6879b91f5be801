"""How far a training has come, besides its weights: what a checkpoint keeps so that training goes on as if nothing had
happened. The batches, learning rates and noise of a step follow from its number and the recipe alone."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Progress:
    """Counters of the training loop."""

    done: int = 0
    """Steps done, skipped ones included."""
    best: float | None = None
    """Lowest mean validation loss."""
    without_gain: int = 0
    """Validations since then."""
    skipped: int = 0
    """Steps whose loss or gradients were not finite."""
    skipped_in_a_row: int = 0
    """Such steps since the last good one."""

    def validated(self, mean: float) -> None:
        """Take note of a mean validation loss."""
        # No comparison with NaN is true: as the best it would stay for ever. Older checkpoints may hold one.
        known = self.best if self.best is not None and math.isfinite(self.best) else math.inf
        if mean < known:
            self.best, self.without_gain = mean, 0
        else:
            self.without_gain += 1

    def as_json(self) -> dict[str, Any]:
        """For state.json."""
        return asdict(self)
