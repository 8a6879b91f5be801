"""Comparing trainings: losses step by step, weights as a whole."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from lander_ds.checkpoint import checkpoint
from lander_ds.common.run_directory import RunDirectory
from lander_ds.method.awareness import STATISTICS, Awareness


def metrics(run: RunDirectory) -> list[dict[str, Any]]:
    """The optimizer steps in metrics.jsonl."""
    return [record for record in _records(run) if "loss" in record]


def validations(run: RunDirectory) -> list[dict[str, Any]]:
    """The validations in metrics.jsonl."""
    return [record for record in _records(run) if "valid_loss" in record]


def _records(run: RunDirectory) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]


def trained(run: RunDirectory) -> dict[str, torch.Tensor]:
    """Trained tensors of the newest checkpoint."""
    return dict(checkpoint.newest(run.checkpoints).trained())


def relative(actual: Sequence[float], expected: Sequence[float]) -> float:
    """Largest relative difference between two series of equal length."""
    assert len(actual) == len(expected) > 0
    return max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(actual, expected, strict=True))


def distance(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm of `expected`, all tensors together."""
    assert set(actual) == set(expected)
    return norm({name: actual[name] - value for name, value in expected.items()}) / norm(expected)


def norm(tensors: Mapping[str, torch.Tensor]) -> float:
    """Euclidean norm of all elements together."""
    return math.sqrt(sum(float(value.double().square().sum()) for value in tensors.values()))


def assert_same_training(run: RunDirectory, expected: RunDirectory, tolerance: float) -> None:
    """Losses, norms, gates, validation losses and trained weights of every step and pair agree."""
    actual, wanted = metrics(run), metrics(expected)
    pairs = sorted({pair for record in wanted for pair in record["loss_per_pair"]})
    assert relative([r["loss"] for r in actual], [r["loss"] for r in wanted]) < tolerance
    for pair in pairs:
        losses = [[r["loss_per_pair"].get(pair, 1.0) for r in records] for records in (actual, wanted)]
        assert relative(*losses) < tolerance
    assert relative([r["grad_norm"] for r in actual], [r["grad_norm"] for r in wanted]) < 1e-4
    assert relative([r["budget_loss"] for r in actual], [r["budget_loss"] for r in wanted]) < 1e-4
    for one, other in zip(actual, wanted, strict=True):
        assert one["lr"] == other["lr"]
        assert one["gates"].keys() == other["gates"].keys()
        for layer, gates in one["gates"].items():
            assert gates == pytest.approx(other["gates"][layer], rel=1e-4)
    assert distance(trained(run), trained(expected)) < tolerance
    last, wanted_last = validations(run)[-1], validations(expected)[-1]
    assert last["valid_loss"] == pytest.approx(wanted_last["valid_loss"], rel=tolerance)


def assert_same_awareness(run: RunDirectory, expected: RunDirectory) -> None:
    """Equal counts, and sums within 1e-5 of the sums of absolute values."""
    actual, wanted = Awareness.load(run.awareness), Awareness.load(expected.awareness)
    assert actual.metadata == wanted.metadata
    assert torch.equal(actual.tokens, wanted.tokens)
    assert torch.equal(actual.active, wanted.active)
    assert wanted.phi().min() > 0
    assert_same_statistics(actual, wanted, 1e-5)


def assert_same_statistics(actual: Awareness, wanted: Awareness, tolerance: float) -> None:
    """Sums within a tolerance relative to the sums of absolute values: terms of sum h cancel."""
    for statistic in STATISTICS:
        one, other = getattr(actual, statistic), getattr(wanted, statistic)
        scale = other.abs() if statistic != "sum_h" else wanted.sum_abs_h
        assert ((one - other).abs() / scale.clamp_min(1e-12)).max() < tolerance, statistic
