"""metrics.jsonl of a training that goes on: every step once, whatever was left of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lander_ds.training.metrics_logger import MetricsLogger
from lander_ds.training.validation import Validation


class _NoMonitor:
    enabled = False


def record(step: int, loss: float = 1.0) -> dict[str, Any]:
    return {
        "step": step,
        "loss": loss,
        "loss_per_pair": {},
        "lr": {},
        "gates": {},
        "grad_norm": 1.0,
        "tokens_per_second": 1.0,
        "skipped": False,
    }


def write(path: Path, steps: range, done: int = 0, loss: float = 1.0) -> None:
    """What a training writes that is killed after the last of `steps`; a validation after every second one."""
    journal = MetricsLogger(path, _NoMonitor(), 1, done)
    for step in steps:
        journal.step(record(step, loss))
        if step % 2 == 0:
            journal.validation(step, Validation({"en-de": loss}))
    journal.close()


def actual(path: Path) -> list[tuple[int, str, float]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        (line["step"], "valid", line["valid_loss_mean"])
        if "valid_loss" in line
        else (line["step"], "train", line["loss"])
        for line in lines
    ]


def test_later_steps_are_dropped_and_done_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 8))
    write(path, range(5, 7), done=4, loss=2.0)
    expected = [(1, "train", 1.0), (2, "train", 1.0), (2, "valid", 1.0), (3, "train", 1.0), (4, "train", 1.0)]
    expected += [(4, "valid", 1.0), (5, "train", 2.0), (6, "train", 2.0), (6, "valid", 2.0)]
    assert actual(path) == expected


def test_a_new_training_drops_everything(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    write(path, range(1, 2), loss=2.0)
    assert actual(path) == [(1, "train", 2.0)]


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(5, 6), done=4)
    assert actual(path) == [(5, "train", 1.0)]


@pytest.mark.parametrize("cut", [1, 2, 40, 100])
def test_a_line_that_was_cut_is_dropped(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    write(path, range(3, 4), done=2)
    assert [(step, kind) for step, kind, _ in actual(path)] == [
        (1, "train"),
        (2, "train"),
        (2, "valid"),
        (3, "train"),
    ]


def test_the_last_line_without_its_end_does_not_run_into_the_next(tmp_path: Path) -> None:
    """A kill between the line and its end: the step is in a checkpoint, so it is not done again."""
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    path.write_bytes(path.read_bytes()[:-1])
    write(path, range(4, 5), done=3)
    assert [step for step, kind, _ in actual(path) if kind == "train"] == [1, 2, 3, 4]
