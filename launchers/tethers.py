"""What ties a launch to its hosts: a guard on each, reached through ssh, and one on this host.

Why ssh's own signs of life are not enough: they end a connection, and nothing that runs at its other end (guard.py).
"""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

GUARD = Path(__file__).with_name("guard.py")
START_SECONDS = 60.0
"""How long a guard may take to answer: Python is read from a network file system."""
END_SECONDS = 20.0
"""How long guards may take to end what is left."""
BEATS = 4
"""Signs of life that are sent in the time that a host may be silent."""


class Tethers:
    """Guards on all hosts, inside the context; at its end they end what is left of the launch."""

    def __init__(
        self, launch_dir: Path, hosts: Sequence[str], ssh: Sequence[str], python: str, seconds: float
    ) -> None:
        """Prepare.

        Args:
            launch_dir: names the launch.
            hosts: beside this one.
            ssh: command and options.
            python: interpreter on every host.
            seconds: how long either side may be silent.
        """
        guard = [python, str(GUARD), str(launch_dir), str(seconds)]
        # A cut link would otherwise be noticed after hours.
        alive = [
            f"-oServerAliveInterval={max(1, int(seconds / BEATS))}",
            f"-oServerAliveCountMax={BEATS - 1}",
        ]
        self._commands = {"this host": guard}
        for host in hosts:
            self._commands[host] = [*ssh, *alive, host, shlex.join(guard)]
        self._interval = seconds / BEATS
        self._guards: dict[str, subprocess.Popen[str]] = {}
        self._wording: set[str] = set()
        self._ended = threading.Event()

    def __enter__(self) -> Tethers:
        for host, command in self._commands.items():
            self._guards[host] = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                # Out of the reach of Ctrl-C in the terminal.
                start_new_session=True,
            )
        self._await_ready()
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        already = self.lost
        self._ended.set()
        for process in self._guards.values():
            with contextlib.suppress(OSError):
                process.stdin and process.stdin.close()
        deadline = time.monotonic() + END_SECONDS
        for host, process in self._guards.items():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.returncode and host not in already:
                self._tell(host, "may have processes of the launch left")

    @property
    def lost(self) -> list[str]:
        """Hosts whose guard has ended; said once."""
        gone = [host for host, process in self._guards.items() if process.poll() is not None]
        for host in gone:
            self._tell(host, "is lost; what runs there ends by itself")
        return gone

    def stop(self) -> None:
        """Ask the ranks to save and stop."""
        self._send("stop")

    def _await_ready(self) -> None:
        def read(process: subprocess.Popen[str]) -> None:
            assert process.stdout is not None
            process.stdout.readline()

        readers = [
            threading.Thread(target=read, args=(process,), daemon=True) for process in self._guards.values()
        ]
        for reader in readers:
            reader.start()
        deadline = time.monotonic() + START_SECONDS
        for host, reader in zip(self._guards, readers, strict=True):
            reader.join(max(0.1, deadline - time.monotonic()))
            if reader.is_alive():
                self._guards[host].kill()
        for process in self._guards.values():
            # A line was read, or the end of a process that is about to be gone.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.05)

    def _beat(self) -> None:
        while not self._ended.wait(self._interval):
            self._send("alive")

    def _send(self, word: str) -> None:
        for process in self._guards.values():
            with contextlib.suppress(OSError, ValueError):
                assert process.stdin is not None
                process.stdin.write(f"{word}\n")
                process.stdin.flush()

    def _tell(self, host: str, what: str) -> None:
        if host in self._wording:
            return
        self._wording.add(host)
        stderr = self._guards[host].stderr
        reason = stderr.read().strip() if stderr is not None else ""
        sys.stderr.write(f"supervise: {host} {what} ({reason or 'its guard has ended'})\n")
        sys.stderr.flush()
