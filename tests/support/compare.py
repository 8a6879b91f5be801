"""Comparing trainings: losses step by step, weights as a whole."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lander_ds.checkpoint import checkpoint
from lander_ds.run import RunDirectory


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
    return checkpoint.newest(run.checkpoints).trained()


def relative(found: Sequence[float], expected: Sequence[float]) -> float:
    """Largest relative difference between two series of equal length."""
    assert len(found) == len(expected) > 0
    return max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(found, expected, strict=True))


def distance(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm of `expected`, all tensors together."""
    assert set(found) == set(expected)
    return norm({name: found[name] - value for name, value in expected.items()}) / norm(expected)


def norm(tensors: Mapping[str, torch.Tensor]) -> float:
    """Euclidean norm of all elements together."""
    return math.sqrt(sum(float(value.double().square().sum()) for value in tensors.values()))
