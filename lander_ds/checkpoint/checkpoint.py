"""Checkpoints: `checkpoints/step-N/` with the trained tensors and what they belong to, independent of DeepSpeed.

    trained.safetensors     every trained tensor once, float32, under its name in the HF model
    selection.safetensors   the selection (methods that have one)
    state.json              step, method, base fingerprint, hashes of the files, versions

A directory called `step-N` is always whole (see `lander_ds.directories`).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lander_ds.directories import replacing
from lander_ds.errors import ArtefactError
from lander_ds.run import file_hash, read_json, versions, write_json
from lander_ds.selection.selection import Selection

TRAINED, SELECTION, STATE = "trained.safetensors", "selection.safetensors", "state.json"
FORMAT = "lander-checkpoint-1"
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int
    state: Mapping[str, Any]

    def trained(self) -> dict[str, torch.Tensor]:
        """Name in the HF model -> float32 tensor.

        Raises:
            ArtefactError: the file is not what was written.
        """
        tensors: dict[str, torch.Tensor] = load_file(self._intact(TRAINED))
        return tensors

    def selection(self) -> Selection | None:
        """The selection it was trained with; None for methods without one.

        Raises:
            ArtefactError: the file is not what was written.
        """
        return Selection.load(self._intact(SELECTION)) if SELECTION in self.state["files"] else None

    def _intact(self, name: str) -> Path:
        path = self.path / name
        if not path.exists() or file_hash(path) != self.state["files"][name]:
            raise ArtefactError(
                f"{path} is missing or not what was written: delete {self.path} and use an earlier checkpoint, "
                "or train again"
            )
        return path


def write(
    directory: Path,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    selection: Path | None,
    description: Mapping[str, Any],
) -> Path:
    """Write `directory/step-N` (one process calls this).

    Args:
        directory: the run's checkpoints.
        step: optimizer steps done.
        tensors: name -> float32 tensor.
        selection: the selection file to keep with it, or None.
        description: JSON values for state.json: method, base fingerprint, options.

    Returns: the path of the checkpoint.
    """
    final = directory / f"step-{step}"
    with replacing(final) as new:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, new / TRAINED)
        if selection is not None:
            shutil.copyfile(selection, new / SELECTION)
        files = {path.name: file_hash(path) for path in sorted(new.iterdir())}
        state = {"format": FORMAT, "step": step, **description, "files": files, "versions": versions()}
        write_json(new / STATE, state)
    return final


def load(path: Path) -> Checkpoint:
    """A checkpoint by its directory.

    Raises:
        ArtefactError: it is missing, incomplete or of another format.
    """
    state = read_json(path / STATE, "choose a complete checkpoint, or train again")
    if state.get("format") != FORMAT:
        raise ArtefactError(f"{path} is not a {FORMAT} directory: choose another checkpoint, or train again")
    return Checkpoint(path, int(state["step"]), state)


def newest(directory: Path) -> Checkpoint:
    """The checkpoint with the most steps.

    Raises:
        ArtefactError: there is none.
    """
    found = [path for path in directory.glob("step-*") if _NAME.fullmatch(path.name)]
    if not found:
        raise ArtefactError(f"no checkpoint in {directory}: run stage train first")
    return load(max(found, key=lambda path: int(path.name.removeprefix("step-"))))


def remove_all(directory: Path) -> None:
    """Delete the checkpoints of an earlier training whose options have changed, and what it left unfinished."""
    for path in [*directory.glob("step-*"), *directory.glob(".step-*.tmp")]:
        shutil.rmtree(path)
