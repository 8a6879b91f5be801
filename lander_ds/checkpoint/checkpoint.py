"""Checkpoints: `checkpoints/step-N/` with the trained tensors and what they belong to, independent of DeepSpeed.

    trained.safetensors     every trained tensor once, float32, under its name in the HF model
    selection.safetensors   the selection (methods that have one)
    state.json              step, method, base fingerprint, hashes of the files, versions

Written to a temporary name and renamed when complete, so a directory called `step-N` is always whole.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lander_ds.errors import ArtefactError
from lander_ds.run import file_hash, read_json, versions, write_json

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
        path = self.path / TRAINED
        cure = f"delete {self.path} and use an earlier checkpoint, or train again"
        if not path.exists() or file_hash(path) != self.state["files"][TRAINED]:
            raise ArtefactError(f"{path} is missing or not what was written: {cure}")
        try:
            tensors: dict[str, torch.Tensor] = load_file(path)
            return tensors
        except SafetensorError as error:
            raise ArtefactError(f"{path} is damaged ({error}): {cure}") from None


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
    temporary = directory / f".step-{step}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / TRAINED)
    if selection is not None:
        shutil.copyfile(selection, temporary / SELECTION)
    for path in temporary.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    files = {path.name: file_hash(path) for path in sorted(temporary.iterdir())}
    state = {"format": FORMAT, "step": step, **description, "files": files, "versions": versions()}
    write_json(temporary / STATE, state)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
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
    """Delete the checkpoints of an earlier training whose options have changed."""
    for path in directory.glob("step-*"):
        if _NAME.fullmatch(path.name):
            shutil.rmtree(path)
