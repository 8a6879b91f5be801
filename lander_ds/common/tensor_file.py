"""Artefacts that are one safetensors file: tensors, and a JSON description with their format in its metadata."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lander_ds.common.errors import ArtefactError
from lander_ds.common.files import flush, writing

_DAMAGE = (SafetensorError, OSError, KeyError, TypeError, AttributeError, ValueError, RuntimeError)
"""What reading a file raises that is not what was written."""


def write(path: Path, kind: str, tensors: Mapping[str, torch.Tensor], description: str) -> None:
    """Write the file so that it is either the old one or the whole new one.

    Args:
        path: its directory is made.
        kind: name of the metadata key. There is one only: safetensors writes several in random order, and equal
            contents must give equal bytes.
        tensors: contiguous, on the CPU.
        description: JSON.
    """
    with writing(path) as temporary:
        save_tensors(temporary, tensors, {kind: description})


def save_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file and flush it to disk.

    It gets the rights of any new file; safetensors alone makes files that only their owner can read, of no use to
    others who share the run directory.
    """
    path.unlink(missing_ok=True)
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata=metadata)
    path.chmod(mode)
    flush(path)


@contextmanager
def reading(path: Path, kind: str, form: str, cure: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The open safetensors file and its description; what goes wrong inside is told as damage of the file.

    Args:
        path: the file.
        kind: the metadata key.
        form: `format` in the description.
        cure: what a user can do, for messages.

    Raises:
        ArtefactError: the file is missing, of another format, or not what was written.
    """
    if not path.exists():
        raise ArtefactError(f"{path} does not exist: {cure}")
    try:
        with safe_open(path, framework="pt") as file:
            description = json.loads((file.metadata() or {}).get(kind, "{}"))
            if description.get("format") != form:
                raise ArtefactError(f"{path} is not a {form} file: {cure}")
            yield file, description
    except _DAMAGE as error:
        raise ArtefactError(f"{path} is damaged ({error}): {cure}") from None
