"""Writing files and directories so that a reader sees the old one or the complete new one, never a part: every atomic
write of this package goes through here. And names of files that were read from a file: they must not lead elsewhere.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lander_ds.common.errors import ArtefactError


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write one file under; it is flushed to disk and renamed when the block ends well.

    When the block raises, `path` stays as it was. A crash leaves `path` as it was or the complete new file, and perhaps
    a hidden `.NAME.PID.tmp`, which nothing reads.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        flush(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)


@contextmanager
def replacing(final: Path) -> Iterator[Path]:
    """An empty directory of the same name to write files into; it takes the place of `final` when the block ends well.

    When the block raises, `final` stays as it was and the new directory is removed. A crash leaves `final` as it was or
    the complete new one; between the two renames it leaves no `final` but the old one under a hidden name, which the
    next call brings back before it does anything else. Other leftovers of a killed process are removed by it too.
    """
    beside, old = (final.with_name(f".{final.name}.{part}.tmp") for part in ("new", "old"))
    if old.exists() and not final.exists():
        old.rename(final)
    for leftover in final.parent.glob(f".{final.name}.*.tmp"):
        _discard(leftover)
    new = beside / final.name
    new.mkdir(parents=True)
    try:
        yield new
        for path in new.rglob("*"):
            flush(path)
        publish(new, final, lambda: old)
    finally:
        _discard(beside)
    _discard(old)


def _discard(path: Path) -> None:
    """Delete a directory, or the link or file that stood in its place."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def publish(
    new: Path, final: Path, aside: Callable[[], Path], keep: Callable[[], bool] = lambda: False
) -> None:
    """Give a complete directory its final name; whatever had that name is first renamed to `aside()`, unless `keep()`
    says that it can stay: then nothing is done.

    The files in `new` must be on disk already. A crash leaves `final` as it was or complete, or, between the renames,
    both directories complete under other names.
    """
    flush(new)
    while True:
        try:
            new.rename(final)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        if keep():
            return
        # Another process could be quicker here; then the loop goes round once more.
        with suppress(FileNotFoundError, FileExistsError):
            final.rename(aside())
    flush(final.parent)


def publish_entry(new: Path, final: Path, keep: Callable[[], bool]) -> None:
    """`publish` for a cache entry, which several processes may be making at once.

    Args:
        new: the complete entry.
        final: its place. An entry that can stay is never moved, not even for a moment: other runs open it. One that
            cannot is deleted; its readers keep their memory maps.
        keep: whether what has that place can stay.
    """
    with (
        tempfile.TemporaryDirectory(
            dir=final.parent, prefix=".discarded-", ignore_cleanup_errors=True
        ) as discarded,
        alone(final.parent),
    ):
        # Several may have to go: where locks do not work, others can be quicker again and again.
        publish(new, final, lambda: Path(tempfile.mkdtemp(dir=discarded), final.name), keep)


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Wait for other processes that hold `lock`, a directory or a file to be made; where there are no locks, go on."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDONLY if lock.is_dir() else os.O_RDWR | os.O_CREAT, 0o600)
    except OSError:
        yield
        return
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


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
    """Write `text` (UTF-8) so that the file is either the old one or the whole new one."""
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


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
