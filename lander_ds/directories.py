"""Writing whole directories: a reader finds the old one or the complete new one, never a part."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
        _flush(path)
    if final.exists():
        final.rename(old)
    new.rename(final)
    _flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
