"""One training per run directory: a lock file that says who holds it, and whose age says whether that one still lives.

    training-lock.json    host, pid, and what tells the process from a later one of that number; touched every few seconds

No file locks of the system: many network file systems have none. Whoever is killed leaves the file behind. On its own
host the process is looked for; of another host the file's age is looked at, by the file system's clock.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from lander_ds.common.errors import ArtefactError, ExitCode
from lander_ds.common.files import write_json

logger = logging.getLogger(__name__)

BEAT_SECONDS = 10.0
"""How often the file is touched."""

STALE_SECONDS = 120.0
"""The age at which a file of another host belongs to nobody any more."""

GRACE_SECONDS = 10.0
"""How long a process of this host is waited for: of a job that was killed, one may live on for a moment."""

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Holder:
    """A process that trains."""

    host: str
    pid: int
    machine: str
    """Boot and PID namespace in which the number means this process."""
    began: int
    """When it was started, in the system's ticks: another process may have the number later."""
    token: str
    """Of this very lock."""

    @staticmethod
    def this() -> Holder:
        """This process."""
        pid = os.getpid()
        return Holder(os.uname().nodename, pid, _machine(), _began(pid) or 0, secrets.token_hex(8))

    @property
    def on_this_machine(self) -> bool:
        """Whether its process can be looked for here."""
        return bool(self.machine) and (self.host, self.machine) == (os.uname().nodename, _machine())

    @property
    def alive(self) -> bool:
        """Whether the process is there; only known `on_this_machine`."""
        return _began(self.pid) == self.began


class RunLock:
    """The lock of a run directory. Only rank 0 takes it, for all ranks."""

    def __init__(self, path: Path) -> None:
        """Prepare.

        Args:
            path: the lock file.
        """
        self._path, self._holder = path, Holder.this()
        self._released = threading.Event()

    def take(self) -> None:
        """Take it, from a dead process too; waits until it is known whether that one is dead, two minutes at most.

        Raises:
            ArtefactError: another process trains in this run directory.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        began, first, said = time.monotonic(), self._touched(), False
        while not self._create() and self._read() != self._holder:
            touched, holder = self._touched(), self._read()
            if touched is None:
                continue  # It has just been released.
            waited = time.monotonic() - began
            if holder is not None and holder.on_this_machine:
                dead, lives = not holder.alive, waited > GRACE_SECONDS
            else:
                dead, lives = self._now() - touched > STALE_SECONDS, touched != first
            if dead:
                self._take_over(holder)
                continue
            who = _named(holder)
            if lives:
                raise ArtefactError(
                    f"{self._path}: {who} trains in this run directory: wait for it, end it, or choose another run_dir; "
                    f"if you know that it is gone, delete {self._path}"
                )
            if not said:
                logger.info("%s belongs to %s: waiting to see whether it still lives", self._path, who)
                said = True
            time.sleep(POLL_SECONDS)
        threading.Thread(target=self._beat, name="run lock", daemon=True).start()

    def release(self) -> None:
        """Give it back; does nothing where it is somebody else's."""
        self._released.set()
        if self._read() == self._holder:
            self._path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Write the file, unless there is one."""
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            json.dump(asdict(self._holder), stream)
        return True

    def _take_over(self, dead: Holder | None) -> None:
        """Put this process's file in the place of a dead one's. Of several that try, one does it: who makes the claim."""
        claim = self._path.with_name(f"{self._path.name}.{'unreadable' if dead is None else dead.token}")
        with suppress(FileNotFoundError):
            if self._now() - claim.stat().st_mtime > STALE_SECONDS:
                claim.unlink()
        try:
            os.close(os.open(claim, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            time.sleep(POLL_SECONDS)
            return
        try:
            # Somebody may have been quicker, from judging to claiming.
            if self._read() == dead:
                write_json(self._path, asdict(self._holder))
                logger.info("%s belonged to %s, which is gone: taken over", self._path, _named(dead))
        finally:
            claim.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            with suppress(OSError):
                holder = self._read()
                if holder is not None and holder != self._holder:
                    logger.error(
                        "%s belongs to process %d on %s now: this one was taken for dead and ends",
                        *(self._path, holder.pid, holder.host),
                    )
                    os._exit(ExitCode.WRONG_INPUT)
                os.utime(self._path)

    def _read(self) -> Holder | None:
        """Who holds it; None where nobody does or the file cannot be understood, as one that is being written."""
        try:
            return Holder(**json.loads(self._path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def _touched(self) -> float | None:
        """When the file was touched last, by the file system's clock; None: there is none."""
        try:
            # A file that is opened is asked for anew, not taken from a network file system's cache.
            with self._path.open("rb") as stream:
                return os.fstat(stream.fileno()).st_mtime
        except FileNotFoundError:
            return None

    def _now(self) -> float:
        """The file system's clock: that of another host may be ahead of this one's."""
        with tempfile.TemporaryFile(dir=self._path.parent) as probe:
            return os.fstat(probe.fileno()).st_mtime


def _named(holder: Holder | None) -> str:
    return "an unknown process" if holder is None else f"process {holder.pid} on {holder.host}"


def _machine() -> str:
    """Boot and PID namespace; empty where the system does not tell them."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _began(pid: int) -> int | None:
    """When a process was started, in ticks since the machine's; None: it is gone, or waits to be buried."""
    try:
        fields = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
