"""Small checkpoints without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lander_ds.checkpoint.retention import Retention
from lander_ds.checkpoint.writer import Parts, Writer

KEEP_ALL = Retention()


def parts(step: int, rank: int = 0) -> Parts:
    """What a rank writes at a step: one tensor of its own and its moments."""
    name, value = f"weight.{rank}", torch.arange(6.0).view(2, 3) + step
    return Parts({name: value}, {f"exp_avg/{name}": value + 1.0, f"exp_avg_sq/{name}": value + 2.0})


def write(directory: Path, step: int, retention: Retention = KEEP_ALL, **description: Any) -> Path:
    """Write one with a file in place of the selection; returns its directory."""
    selection = directory.parent / "selection.safetensors"
    selection.parent.mkdir(parents=True, exist_ok=True)
    selection.write_bytes(b"a selection")
    writer = Writer(directory, retention, background=False)
    writer.save(step, parts(step), description, selection)
    writer.finish()
    return directory / f"step-{step}"


def flip(path: Path) -> None:
    """Change one bit near the end of a file."""
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
