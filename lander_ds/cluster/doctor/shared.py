"""Whether a directory is the same one on all hosts: one host leaves a file there, the others look for it."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

SEEN_SECONDS = 5.0
"""How long a new file may take to be seen: network file systems keep listings of directories for some seconds."""


def existing(directory: Path) -> Path:
    """The directory, or the nearest one above it that exists: there it would be made."""
    directory = directory.absolute()
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    return directory


def free_bytes(directory: Path) -> int | None:
    """On the disk where a directory lies, or would be made; None where that cannot be seen."""
    try:
        return shutil.disk_usage(existing(directory)).free
    except OSError:
        return None


class Tokens:
    """The files that this host has left, and the directories made for them."""

    def __init__(self) -> None:
        self._files: list[Path] = []
        self._created: list[Path] = []

    def put(self, directory: Path, token: str) -> dict[str, Any]:
        """Make the directory where there is none, and leave a file there.

        Returns: `path`, and `error`: why nothing can be written, or None.
        """
        missing = [path for path in (directory, *directory.parents) if not path.exists()]
        file = directory / _name(token)
        try:
            for path in reversed(missing):
                path.mkdir()
                self._created.append(path)
            self._files.append(file)
            file.write_text(token, encoding="utf-8")
        except OSError as error:
            return {"path": str(directory.resolve()), "error": error.strerror or str(error)}
        return {"path": str(directory.resolve()), "error": None}

    def find(self, directory: Path, token: str) -> dict[str, Any]:
        """Look for another host's file, and write one's own beside it.

        Returns: `path`, `seen` (bool) and `error`: why nothing can be written there, or None.
        """
        file, deadline = directory / _name(token), time.monotonic() + SEEN_SECONDS
        while not (seen := _holds(file, token)) and time.monotonic() < deadline:
            time.sleep(0.1)
        own = existing(directory) / _name(f"{token}-{secrets.token_hex(4)}")
        why: str | None = None
        try:
            own.write_text(token, encoding="utf-8")
        except OSError as error:
            why = error.strerror or str(error)
        finally:
            with suppress(OSError):
                own.unlink()
        return {"path": str(directory.resolve()), "seen": seen, "error": why}

    def remove(self) -> None:
        """Delete the files, and the directories that were made if nothing else has come into them."""
        for file in self._files:
            with suppress(OSError):
                file.unlink()
        for path in reversed(self._created):
            try:
                path.rmdir()
            except OSError:
                break
        self._files, self._created = [], []


def _name(token: str) -> str:
    return f".lander-doctor-{token}"


def _holds(file: Path, token: str) -> bool:
    try:
        # Some network file systems look again at a directory only when it is listed.
        os.listdir(file.parent)
        return file.read_text(encoding="utf-8") == token
    except OSError:
        return False
