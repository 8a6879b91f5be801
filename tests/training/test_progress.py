"""How far a training has come, as a checkpoint keeps it."""

from __future__ import annotations

import json

import pytest

from lander_ds.training.progress import GATE_STEPS, Progress


def test_a_new_training_has_done_nothing() -> None:
    assert Progress().as_json() == {
        "done": 0,
        "best": None,
        "criterion": "loss",
        "without_gain": 0,
        "skipped": 0,
        "skipped_in_a_row": 0,
        "gates": {},
        "averaged": 0,
    }


def test_validations_without_gain_are_counted() -> None:
    progress, seen = Progress(), []
    for mean in (2.0, 1.5, 1.5, 1.7, 1.4, 1.6):
        progress.validated(mean)
        seen.append((progress.best, progress.without_gain))
    # As good as the best is no gain.
    assert seen == [(2.0, 0), (1.5, 0), (1.5, 1), (1.5, 2), (1.4, 0), (1.4, 1)]


def test_a_mean_that_is_no_number_is_no_gain() -> None:
    progress = Progress()
    progress.validated(2.0)
    progress.validated(float("nan"))
    assert (progress.best, progress.without_gain) == (2.0, 1)


def test_of_chrf_more_is_better() -> None:
    progress, seen = Progress(), []
    progress.judge_by("chrf")
    for mean in (0.0, 2.0, 1.5, 2.0, float("nan"), 2.5):
        progress.validated(mean)
        seen.append((progress.best, progress.without_gain))
    assert seen == [(0.0, 0), (2.0, 0), (2.0, 1), (2.0, 2), (2.0, 3), (2.5, 0)]


def test_the_best_by_another_criterion_is_forgotten() -> None:
    progress = Progress()
    progress.validated(1.5)
    progress.validated(1.7)
    progress.judge_by("loss")
    assert (progress.best, progress.without_gain) == (1.5, 1)
    progress.judge_by("chrf")
    assert (progress.best, progress.without_gain) == (None, 0)
    progress.validated(30.0)
    assert (progress.best, progress.without_gain) == (30.0, 0)


@pytest.mark.parametrize("worthless", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_the_best(worthless: float) -> None:
    progress = Progress()
    progress.validated(worthless)
    assert (progress.best, progress.without_gain) == (None, 1)
    progress.validated(3.0)
    assert (progress.best, progress.without_gain) == (3.0, 0)
    progress.validated(worthless)
    assert (progress.best, progress.without_gain) == (3.0, 1)


def test_a_best_of_nan_in_an_old_checkpoint_is_forgotten() -> None:
    progress = Progress(best=float("nan"))
    progress.validated(3.0)
    assert (progress.best, progress.without_gain) == (3.0, 0)


def test_the_last_gate_values_of_a_pair_are_kept() -> None:
    progress = Progress()
    for step in range(GATE_STEPS + 2):
        progress.gated({"2": {"en-de": float(step)} | ({"en-fr": 7.0} if step == 0 else {})})
    progress.gated({"2": {"en-de": float("nan")}})
    assert progress.gates == {"2": {"en-de": [float(s) for s in range(2, GATE_STEPS + 2)], "en-fr": [7.0]}}


def test_it_comes_back_from_json() -> None:
    progress = Progress(done=7, skipped=2, skipped_in_a_row=1)
    progress.validated(1.0 / 3.0)
    progress.validated(0.1 + 0.2 + 0.3)
    progress.gated({"2": {"en-de": 1.0 / 3.0}})
    assert Progress(**json.loads(json.dumps(progress.as_json()))) == progress
