"""SHA-256 of large files that seldom change, such as a base's weights: computed once, and kept in the user's cache
directory for as long as size, times and inode of the file stay what they were.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from lander_ds.common.errors import ArtefactError
from lander_ds.common.files import alone, file_hash, json_hash, read_json, write_json

logger = logging.getLogger(__name__)

SMALL = 1 << 26
"""Files below this many bytes are hashed every time: that takes a twentieth of a second."""
SETTLED = 2.0
"""Seconds. A file that was written later than this before its hashing could change again without another time of its
own, so its hash is not kept."""


def content_hash(path: Path) -> str:
    """SHA-256 of a file's bytes (hex). Of several processes that ask at once, one computes it and the others wait."""
    state = _state(path)
    if state["size"] < SMALL:
        return file_hash(path)
    entry = cache_directory() / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()}.json"
    with alone(entry.with_suffix(".lock")):
        if (known := _known(entry, state)) is not None:
            return known
        logger.info("hashing %s (%.1f GB), once as long as it stays the same", path, state["size"] / 1e9)
        settled = time.time() - state["mtime_ns"] / 1e9 > SETTLED
        digest = file_hash(path)
        if settled and _state(path) == state:
            content = {**state, "sha256": digest}
            with suppress(OSError):  # a read-only home only makes it slower
                write_json(entry, {**content, "check": json_hash(content)})
        return digest


def cache_directory() -> Path:
    """Where hashes are kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "lander_ds" / "hashes"


def _state(path: Path) -> dict[str, int]:
    """What changes whenever the file does."""
    stat = path.stat()
    return {
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "ctime_ns": stat.st_ctime_ns,
        "inode": stat.st_ino,
    }


def _known(entry: Path, state: dict[str, int]) -> str | None:
    """The hash that was kept for a file in this very state; a damaged entry counts for nothing."""
    try:
        content: dict[str, Any] = dict(read_json(entry, ""))
        check = content.pop("check")
        digest = str(content.pop("sha256"))
    except (ArtefactError, OSError, KeyError, TypeError, ValueError):
        return None
    return digest if content == state and check == json_hash({**state, "sha256": digest}) else None
