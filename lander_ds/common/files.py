"""Writing whole directories: a reader finds the old one or the complete new one, never a part. And names of files
that were read from a file: they must not lead elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lander_ds.common.errors import ArtefactError


@contextmanager
def replacing(final: Path) -> Iterator[Path]:
    """An empty directory beside `final` to write files into; it takes the place of `final` when the block ends well.

    When the block raises, `final` stays as it was and the new directory is removed. What a killed process left
    behind is removed by the next call.
    """
    for leftover in final.parent.glob(f".{final.name}.*.tmp"):
        shutil.rmtree(leftover)
    new, old = (final.with_name(f".{final.name}.{part}.tmp") for part in ("new", "old"))
    new.mkdir(parents=True)
    try:
        yield new
    except BaseException:
        shutil.rmtree(new)
        raise
    for path in (*new.iterdir(), new):
        flush(path)
    if final.exists():
        final.rename(old)
    new.rename(final)
    flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_inside(name: object) -> bool:
    """Whether `name` is a relative path that stays below the directory it counts from, by its letters alone."""
    if not isinstance(name, str):
        raise TypeError(f"{name!r} is not a file name")
    parts = Path(name).parts
    return bool(parts) and not Path(name).is_absolute() and ".." not in parts and "\0" not in name


def inside(directory: Path, name: object, source: Path) -> Path:
    """`directory / name`, for a name that was read from `source`.

    Raises:
        ArtefactError: it is no file name, or leads out of the directory.
    """
    if not isinstance(name, str) or not is_inside(name):
        raise ArtefactError(
            f"{source} names {name!r}, which is no path inside {directory}: somebody has edited it; delete it, or "
            "do not use this directory"
        )
    return directory / name


def file_hash(path: Path) -> str:
    """SHA-256 of a file, or of the sorted relative names and contents of a directory's files (hex)."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            if path.is_dir():
                digest.update(str(file.relative_to(path)).encode() + b"\0")
            with file.open("rb") as stream:
                while block := stream.read(1 << 22):
                    digest.update(block)
    return digest.hexdigest()


def json_hash(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form (hex)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON so that the file is either the old one or the whole new one."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` to a temporary name, flush it to disk and rename it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def read_json(path: Path, cure: str) -> Any:
    """Parse a JSON artefact.

    Raises:
        ArtefactError: the file is missing or damaged; the message ends with `cure`.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtefactError(f"{path} does not exist: {cure}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtefactError(f"{path} is not valid JSON ({error}): {cure}") from None
