"""Reading checkpoints: `checkpoints/step-N/`, independent of DeepSpeed, topology and number of ranks.

    trained-R.safetensors    the trained tensors that rank R wrote, float32, under their names in the HF model
    optimizer-R.safetensors  their moments: `exp_avg/NAME` and `exp_avg_sq/NAME`, float32
    averaged-R.safetensors   averages of the trained tensors over steps, where there are any, like trained-R
    selection.safetensors    the selection (methods that have one)
    state.json               step, what it belongs to, progress, size and hash of every file and of itself

Together the files hold every trained tensor once; which rank wrote which says nothing about who may read it. A
directory called `step-N` is whole unless something damaged it later (see `checkpoint.writer`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lander_ds.common.errors import ArtefactError
from lander_ds.common.files import file_hash, json_hash, read_json
from lander_ds.method.selection import Selection

logger = logging.getLogger(__name__)

TRAINED, OPTIMIZER, AVERAGED = "trained", "optimizer", "averaged"
SELECTION, STATE = "selection.safetensors", "state.json"
DIGEST = "state_sha256"
"""Key in state.json: `json_hash` of everything else in it."""
FORMAT = "lander-checkpoint-2"
_NAME = re.compile(r"step-(\d+)")
_FILE = re.compile(rf"(({TRAINED}|{OPTIMIZER}|{AVERAGED})-\d+|selection)\.safetensors")


class StoredTensors(Mapping[str, torch.Tensor]):
    """Tensors of several safetensors files by name, each read when it is asked for."""

    def __init__(self, files: list[Path]) -> None:
        """Read the names in `files`.

        Raises:
            ArtefactError: a file is damaged.
        """
        self._where: dict[str, Path] = {}
        for path in files:
            try:
                with safe_open(path, framework="pt") as stored:
                    self._where.update(dict.fromkeys(stored.keys(), path))
            except (OSError, SafetensorError) as error:
                raise ArtefactError(f"{path} is damaged ({error}): use an earlier checkpoint") from error

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self._where[name], framework="pt") as stored:
            tensor: torch.Tensor = stored.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk."""

    path: Path
    step: int
    state: Mapping[str, Any]
    checked: bool = False
    """Every file has been compared with its hash already."""

    def trained(self) -> StoredTensors:
        """Name in the HF model -> float32 tensor.

        Raises:
            ArtefactError: a file is not what was written.
        """
        return self._tensors(TRAINED)

    def optimizer(self) -> StoredTensors:
        """`exp_avg/NAME` and `exp_avg_sq/NAME` -> float32 tensor; empty for optimizers without state.

        Raises:
            ArtefactError: a file is not what was written.
        """
        return self._tensors(OPTIMIZER)

    def averaged(self) -> StoredTensors:
        """Name in the HF model -> float32 average over steps; empty where there is none.

        Raises:
            ArtefactError: a file is not what was written.
        """
        return self._tensors(AVERAGED)

    def result(self) -> StoredTensors:
        """What is translated with and exported, named like `trained`: the averages where there are any, else that.

        Raises:
            ArtefactError: a file is not what was written.
        """
        return self.averaged() or self.trained()

    def selection(self) -> Selection | None:
        """The selection it was trained with; None for methods without one.

        Raises:
            ArtefactError: the file is not what was written.
        """
        return Selection.load(self._intact(SELECTION)) if SELECTION in self.state["files"] else None

    def verified(self) -> Checkpoint:
        """The same checkpoint, once every file has been compared with its recorded size and hash.

        Raises:
            ArtefactError: names the first file that is not what was written.
        """
        for name in self.state["files"]:
            self._intact(name)
        return replace(self, checked=True)

    def _tensors(self, kind: str) -> StoredTensors:
        return StoredTensors(
            [self._intact(name) for name in self.state["files"] if name.startswith(f"{kind}-")]
        )

    def _intact(self, name: str) -> Path:
        path, recorded = self.path / name, self.state["files"][name]
        try:
            intact = path.stat().st_size == recorded["bytes"] and (
                self.checked or file_hash(path) == recorded["sha256"]
            )
            why = "is not what was written"
        except OSError as error:
            # Missing, or on a failing disk.
            intact, why = False, f"cannot be read ({error.strerror})"
        if not intact:
            raise ArtefactError(
                f"{path} {why}: delete {self.path} and use an earlier checkpoint, or train again"
            )
        return path


def load(path: Path) -> Checkpoint:
    """A checkpoint by its directory.

    Raises:
        ArtefactError: it is missing, incomplete or of another format.
    """
    cure = "choose a complete checkpoint, or train again"
    try:
        state = read_json(path / STATE, cure)
    except OSError as error:
        raise ArtefactError(f"{path / STATE} cannot be read ({error.strerror}): {cure}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ArtefactError(f"{path} is not a {FORMAT} directory: {cure}")
    try:
        sound = state.pop(DIGEST) == json_hash(state)
        step, files = int(state["step"]), dict(state["files"])
        # Names come from a file: none may lead out of the directory.
        sound = sound and all(
            _FILE.fullmatch(name) and {"bytes", "sha256"} <= set(kept) for name, kept in files.items()
        )
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise ArtefactError(f"{path / STATE} is damaged: {cure}")
    if _NAME.fullmatch(path.name) and path.name != f"step-{step}":
        raise ArtefactError(f"{path} is step {step}, somebody has renamed it: rename it back")
    return Checkpoint(path, step, state)


def steps(directory: Path) -> list[int]:
    """Steps of the checkpoints in a directory, ascending."""
    return sorted(
        int(path.name.removeprefix("step-"))
        for path in directory.glob("step-*")
        if _NAME.fullmatch(path.name)
    )


def newest(directory: Path) -> Checkpoint:
    """The checkpoint with the most steps among those that are whole; damaged ones are reported and passed over.

    Raises:
        ArtefactError: there is none.
    """
    saved = steps(directory)
    for step in reversed(saved):
        try:
            return load(directory / f"step-{step}").verified()
        except ArtefactError as error:
            logger.warning("%s; looking for an earlier one", error)
    if not saved:
        raise ArtefactError(f"no checkpoint in {directory}: run stage train first")
    raise ArtefactError(
        f"none of the {len(saved)} checkpoints in {directory} is whole: bring one back from a backup, or train again "
        "in another run_dir (or with --force, which deletes them)"
    )
