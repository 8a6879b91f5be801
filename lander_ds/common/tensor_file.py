"""Artefacts that are one safetensors file: tensors, and in its metadata a JSON description with their format and the
SHA-256 of the whole file. While that is computed, zeros stand in its place. Files of version 0.1.0 lack it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
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

HASH = "sha256"
_ZEROS = "0" * 64


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
        hashed = json.dumps({**json.loads(description), HASH: _ZEROS})
        save_tensors(temporary, tensors, {kind: hashed})
        position, digest = _hash(temporary, _ZEROS)
        with temporary.open("r+b") as stream:
            stream.seek(position)
            stream.write(digest.encode())


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
def reading(
    path: Path, kind: str, form: str, cure: str, keys: Collection[str] | None = None
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The open safetensors file and its description; what goes wrong inside is told as damage of the file. Its hash is
    compared last, because a fault that has a name says more.

    Args:
        path: the file.
        kind: the metadata key.
        form: `format` in the description.
        cure: what a user can do, for messages.
        keys: what else may be in the description; None: anything.

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
            recorded = description.pop(HASH, None)
            yield file, description
        # One bit makes the key of the hash another one.
        if keys is not None and (unknown := description.keys() - {"format", *keys}):
            raise ValueError(f"unknown {', '.join(sorted(unknown))}")
        if recorded is not None and _hash(path, recorded)[1] != recorded:
            raise ValueError("its hash is another one than when it was written")
    except _DAMAGE as error:
        raise ArtefactError(f"{path} is damaged ({error}): {cure}") from None


def _hash(path: Path, recorded: str) -> tuple[int, str]:
    """Where in a file `recorded` stands, and the SHA-256 (hex) of the file with zeros there.

    Raises:
        ValueError: `recorded` is no hash.
    """
    with path.open("rb") as stream:
        header = stream.read(int.from_bytes(stream.read(8), "little"))
        if len(recorded) != len(_ZEROS):
            raise ValueError(f"{recorded!r} is no hash")
        position = 8 + header.rindex(recorded.encode())
        stream.seek(0)
        digest = hashlib.sha256(stream.read(position))
        digest.update(_ZEROS.encode())
        stream.seek(len(_ZEROS), os.SEEK_CUR)
        while block := stream.read(1 << 22):
            digest.update(block)
    return position, digest.hexdigest()
