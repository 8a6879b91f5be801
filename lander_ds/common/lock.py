"""One process at a time: a file that names the process at work, which touches it as long as it lives.

It needs nothing of the file system but that a file is created once (network file systems without locks have that). A
process that was killed leaves its file behind. On the same machine its number tells that it is gone; from another one
the file is watched: a process that has not touched it for a while has ended, whatever the clocks say.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from lander_ds.common.errors import ArtefactError, ExitCode

logger = logging.getLogger(__name__)

BEAT_SECONDS = 5.0
PATIENCE_SECONDS = 30.0
"""How long another process may take to end."""
SILENCE_SECONDS = 120.0
"""How long one on another machine may give no sign of life: file systems stall, too."""
POLL_SECONDS = 0.5


@contextmanager
def locked(path: Path, what: str, patience: float | None = None) -> Iterator[None]:
    """Hold `path` as a lock within this context.

    Args:
        path: the lock file; its directory is made.
        what: what it protects, for messages.
        patience: seconds that another process is given to end, or, on another machine, to show that it lives (default:
            PATIENCE_SECONDS and SILENCE_SECONDS).

    Raises:
        ArtefactError: another process holds it and lives.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    own = _this()
    patience, silence = (PATIENCE_SECONDS, SILENCE_SECONDS) if patience is None else (patience, patience)
    _acquire(path, own, what, patience, silence)
    ended = threading.Event()
    threading.Thread(target=_beat, args=(path, own, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        if _read(path)[0] == own:
            path.unlink(missing_ok=True)


def _acquire(path: Path, own: dict[str, Any], what: str, patience: float, silence: float) -> None:
    last, since, changed, beaten, waiting = None, time.monotonic(), time.monotonic(), False, False
    while not _create(path, own):
        owner, beat = _read(path)
        if owner is None:
            continue  # it has just been given back
        if beat != last:
            beaten, last, changed = last is not None, beat, time.monotonic()
        here = owner.get("machine") == _machine()
        if (here and not _lives(owner)) or (not here and time.monotonic() - changed >= silence):
            logger.warning("%s: %s has ended without giving it back; going on", path, _described(owner))
            _discard(path, owner)
            continue
        if (here or beaten) and time.monotonic() - since >= patience:
            raise ArtefactError(
                f"{what} is being worked on by {_described(owner)}: wait until it has ended, or use another run_dir "
                f"(if it has ended, delete {path})"
            )
        if not waiting:
            logger.info("%s: waiting for %s to end", path, _described(owner))
        waiting = True
        time.sleep(POLL_SECONDS)


def _this() -> dict[str, Any]:
    """What a lock of this process says."""
    return {
        "machine": _machine(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
        "command": shlex.join(sys.argv),
        "token": secrets.token_hex(8),
    }


def _create(path: Path, owner: dict[str, Any]) -> bool:
    """Create the file with everything in it, or not at all: a reader must not find half of it."""
    own = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}.new")
    own.write_text(json.dumps(owner), encoding="utf-8")
    try:
        os.link(own, path)
    except FileExistsError:
        return False
    except OSError:
        # A file system without links.
        with suppress(FileExistsError), path.open("x", encoding="utf-8") as file:
            file.write(json.dumps(owner))
            return True
        return False
    finally:
        own.unlink()
    return True


def _discard(path: Path, owner: dict[str, Any]) -> None:
    """Remove the lock of a process that has ended, and no other: somebody else could have been quicker."""
    aside = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.ended")
    with suppress(FileNotFoundError):
        path.rename(aside)
        if _read(aside)[0] != owner:
            with suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink()


def _read(path: Path) -> tuple[dict[str, Any] | None, int]:
    """Which process holds the lock, and when it last touched it; None: no process does."""
    try:
        # Opened, because network file systems look at the server then.
        with path.open(encoding="utf-8") as file:
            beat = os.fstat(file.fileno()).st_mtime_ns
            owner = json.load(file)
    except FileNotFoundError:
        return None, -1
    except ValueError:
        owner, beat = {}, path.stat().st_mtime_ns if path.exists() else -1
    return owner if isinstance(owner, dict) else {}, beat


def _beat(path: Path, own: dict[str, Any], ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        with suppress(OSError):
            owner = _read(path)[0]
            if owner and owner != own:
                # Stopped for a while, or cut off from the file system. Two must not go on.
                logger.error(
                    "%s: this process was taken for dead, and %s went on; it ends", path, _described(owner)
                )
                os._exit(ExitCode.WRONG_INPUT)
            os.utime(path)


def _machine() -> str:
    """This boot of this machine, and the container: where numbers of processes mean the same."""
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    with suppress(OSError):
        return f"{boot.read_text().strip()} {os.readlink(space)}"
    return socket.gethostname()


def _lives(owner: dict[str, Any]) -> bool:
    try:
        process = psutil.Process(int(owner["pid"]))
        same = abs(process.create_time() - float(owner["started"])) < 1.0
        return bool(same and process.status() != psutil.STATUS_ZOMBIE)
    except (psutil.NoSuchProcess, KeyError, ValueError):
        return False


def _described(owner: dict[str, Any]) -> str:
    return (
        f"process {owner.get('pid', '?')} on {owner.get('host', 'an unknown host')} "
        f"({owner.get('command', 'unknown')})"
    )
