"""Which checkpoints are deleted."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.small import flip, write

from lander_ds.checkpoint.checkpoint import STATE, newest, steps
from lander_ds.checkpoint.retention import Retention, best, superfluous

STEPS = (10, 20, 30, 40, 50)


def written(directory: Path, losses: dict[int, float] | None = None) -> Path:
    for step in STEPS:
        write(directory, step, valid_loss=(losses or {}).get(step))
    return directory


def deleted(directory: Path, retention: Retention, step: int = 50) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in superfluous(directory, retention, step)]


@pytest.mark.parametrize(
    ("retention", "expected"),
    [
        (Retention(), []),
        (Retention(last=0, every=20), []),
        (Retention(last=1), [10, 20, 30, 40]),
        (Retention(last=2), [10, 20, 30]),
        (Retention(last=5), []),
        (Retention(last=99), []),
        (Retention(last=1, every=20), [10, 30]),
        (Retention(last=2, every=30), [10, 20]),
        (Retention(last=1, every=7), [10, 20, 30, 40]),
    ],
)
def test_the_newest_and_every_so_many_stay(tmp_path: Path, retention: Retention, expected: list[int]) -> None:
    assert deleted(written(tmp_path), retention) == expected


def test_the_best_stays(tmp_path: Path) -> None:
    written(tmp_path, {10: 2.0, 20: 1.5, 40: 1.7})
    assert deleted(tmp_path, Retention(last=1)) == [10, 30, 40]
    assert deleted(tmp_path, Retention(last=1, best=False)) == [10, 20, 30, 40]


def test_of_equally_good_ones_the_first(tmp_path: Path) -> None:
    assert best(written(tmp_path, {40: 1.5, 20: 1.5}), list(STEPS)) == {20}


@pytest.mark.parametrize(
    ("newest_by", "expected"), [("chrf", {20}), ("loss", {30}), ("comet", {10}), ("off", {30}), (None, {30})]
)
def test_the_newest_says_what_the_best_is_best_in(tmp_path: Path, newest_by: str, expected: set[int]) -> None:
    scores = {10: (2.0, None), 20: (1.9, 40.0), 30: (1.5, 38.0), 40: (1.7, 40.0), 50: (None, None)}
    for step, (loss, chrf) in scores.items():
        by = newest_by if step == max(scores) else "loss"
        comet = None if loss is None else loss / 2
        write(tmp_path, step, valid_loss=loss, valid_chrf=chrf, valid_comet=comet, train={"keep_best": by})
    assert best(tmp_path, list(STEPS)) == expected


def test_checkpoints_of_before_chrf_existed(tmp_path: Path) -> None:
    for step, loss in {10: 2.0, 20: 1.5, 30: 1.7}.items():
        write(tmp_path, step, valid_loss=loss, train={"keep_best": True})
    assert best(tmp_path, [10, 20, 30]) == {20}


@pytest.mark.parametrize("worthless", [float("nan"), float("-inf"), float("inf")])
def test_what_is_not_finite_is_not_the_best(tmp_path: Path, worthless: float) -> None:
    assert best(written(tmp_path, {10: worthless, 20: 1.5, 30: 1.2, 40: worthless}), list(STEPS)) == {30}


def test_none_is_best_without_validation(tmp_path: Path) -> None:
    assert best(written(tmp_path), list(STEPS)) == set()


def test_one_without_a_readable_state_is_not_the_best(tmp_path: Path) -> None:
    flip(written(tmp_path, {20: 1.0, 30: 2.0}) / "step-20" / STATE)
    assert best(tmp_path, list(STEPS)) == {30}


def test_writing_deletes(tmp_path: Path) -> None:
    for step in STEPS:
        write(tmp_path, step, Retention(last=2, every=20))
    assert steps(tmp_path) == [20, 40, 50]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-20", "step-40", "step-50"]


def test_damaged_later_ones_do_not_push_out_whole_ones(tmp_path: Path) -> None:
    """A resume has passed over steps 40 and 50: they must not count as the newest when step 31 is there."""
    written(tmp_path)
    for step in (40, 50):
        flip(tmp_path / f"step-{step}" / "trained-0.safetensors")
    write(tmp_path, 31, Retention(last=1))
    assert steps(tmp_path) == [31, 40, 50]
    assert newest(tmp_path).step == 31
