"""What a rank knows about its start: the facts that `distributed.agreement` compares between ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lander_ds
from lander_ds.checkpoint.checkpoint import STATE, steps
from lander_ds.common.errors import LanderError
from lander_ds.common.files import file_hash, read_json
from lander_ds.common.nested import flatten
from lander_ds.common.run_directory import RunDirectory, versions
from lander_ds.data.prepared import CURE, PreparedData
from lander_ds.distributed import accelerator
from lander_ds.distributed.start import Start

SMALL_MODEL_FILES = (".json", ".txt", ".model", ".py")
MISSING = "missing"
DIGITS = 16
"""Leading hexadecimal digits of a hash that are compared and shown."""


def collect(start: Start, command: Mapping[str, object] | None = None) -> dict[str, dict[str, str]]:
    """The facts of this process; what cannot be read is told as a value, so that every rank can compare.

    Args:
        start: this rank's.
        command: what this rank was told to do; left out of the facts when None.
    """
    return {
        **({} if command is None else {"command": _as_json(command)}),
        "recipe": _as_json(asdict(start.recipe)),
        "deepspeed": _as_json(start.deepspeed),
        "device": {"kind": accelerator.kind()},
        "package": versions(),
        "base": _base(start),
        "run_dir": _files(start.run),
        "code": _code(),
    }


def _as_json(value: Mapping[str, Any]) -> dict[str, str]:
    """Nested mappings and lists as `a.b.0` -> JSON text."""
    return {name: json.dumps(item, ensure_ascii=False) for name, item in flatten(value, lists=True).items()}


def _base(start: Start) -> dict[str, str]:
    """Weights and configuration as one; tokenizer, generation options and code by file."""
    model = Path(start.recipe.model.path)
    facts = {"model": _state(model, lambda _: start.base_fingerprint.rpartition(":")[2])}
    for path in sorted(model.glob("*")):
        # The fingerprint leaves out of config.json what does not matter.
        if path.suffix in SMALL_MODEL_FILES and path.name != "config.json":
            facts[path.name] = _state(path, file_hash)
    return facts


def _files(run: RunDirectory) -> dict[str, str]:
    """What earlier stages left in the run directory."""
    newest = f"step-{max(steps(run.checkpoints), default=0)}"
    state = _state(run.checkpoints / newest / STATE, file_hash)
    return {
        "prepared data": _state(
            # Whatever recipe it was made for: another recipe is named as such.
            run.data / "prepared.json",
            lambda path: PreparedData(run.path / read_json(path, CURE)["entry"]).hash,
        ),
        "selection": _state(run.selection, file_hash),
        "newest checkpoint": MISSING if state == MISSING else f"{newest} {state}",
    }


def _state(path: Path, read: Callable[[Path], str]) -> str:
    """The first digits of what `read` makes of `path`, or why there is nothing."""
    try:
        return read(path)[:DIGITS] if path.exists() else MISSING
    except (LanderError, OSError, KeyError, TypeError) as error:
        return f"unreadable ({error})"


def _code() -> dict[str, str]:
    """Content hash of every source file of this package."""
    root = Path(lander_ds.__file__).parent
    return {
        file.relative_to(root).as_posix(): file_hash(file)[:DIGITS] for file in sorted(root.rglob("*.py"))
    }
