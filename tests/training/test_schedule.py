"""Learning rates and noise as functions of the step."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lander_ds.config.schema.training import TrainConfig
from lander_ds.training.schedule import lr_factor, noise_alpha


def factors(**options: Any) -> list[float]:
    train = TrainConfig(**{"steps": 10, **options})
    return [lr_factor(step, train) for step in range(train.steps)]


def test_constant_stays_at_the_peak() -> None:
    assert factors(schedule="constant") == [1.0] * 10


def test_linear_falls_evenly_towards_the_minimum() -> None:
    assert factors(schedule="linear") == pytest.approx([1 - step / 10 for step in range(10)])
    assert factors(schedule="linear", min_lr_ratio=0.2) == pytest.approx(
        [1 - 0.8 * step / 10 for step in range(10)]
    )


def test_cosine() -> None:
    assert factors(schedule="cosine") == pytest.approx(
        [(1 + math.cos(math.pi * step / 10)) / 2 for step in range(10)]
    )


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warm_up_rises_evenly_and_reaches_the_peak(schedule: str) -> None:
    actual = factors(schedule=schedule, warmup_steps=4)
    assert actual[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert min(actual) > 0, "no step is wasted on a rate of zero"
    assert actual[4:] == sorted(actual[4:], reverse=True)


def test_the_minimum_is_where_the_last_step_ends() -> None:
    train = TrainConfig(steps=10, schedule="cosine", warmup_steps=3, min_lr_ratio=0.1)
    assert lr_factor(10, train) == pytest.approx(0.1)
    assert lr_factor(1000, train) == pytest.approx(0.1)


def test_one_step_is_trained_at_the_peak() -> None:
    for schedule in ("constant", "linear", "cosine"):
        assert lr_factor(0, TrainConfig(steps=1, schedule=schedule)) == 1.0


def test_noise_grows_from_nothing_to_its_maximum() -> None:
    assert [noise_alpha(step, 5, 2.0) for step in range(5)] == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0])
    assert noise_alpha(0, 1, 2.0) == 0.0
