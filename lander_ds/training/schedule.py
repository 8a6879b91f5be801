"""Learning-rate and noise schedules: pure functions of the step, so that resuming needs no state."""

from __future__ import annotations

import math

from lander_ds.config.schema.training import TrainConfig


def lr_factor(step: int, train: TrainConfig) -> float:
    """Learning rate at `step` (from 0) over the peak learning rate.

    Linear warm-up reaches the peak at step `warmup_steps`; linear and cosine then fall to `min_lr_ratio`, which they
    reach at the end of the last step.
    """
    if step < train.warmup_steps:
        return (step + 1) / (train.warmup_steps + 1)
    if train.schedule == "constant":
        return 1.0
    span = max(1, train.steps - train.warmup_steps)
    done = min(1.0, (step - train.warmup_steps) / span)
    shape = 1.0 - done if train.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return train.min_lr_ratio + (1.0 - train.min_lr_ratio) * shape


def noise_alpha(step: int, steps: int, alpha_max: float) -> float:
    """Weight of the gate noise: linear from 0 to `alpha_max` over training (R, Zhang et al. 2021)."""
    return alpha_max * step / max(1, steps - 1)
