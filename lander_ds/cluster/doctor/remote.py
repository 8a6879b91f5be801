"""A conversation with the probe on a host, over ssh; or without ssh, with one on this machine.

The probe runs as long as its standard input is open, so nothing of it outlives this process, however that ends.
Every question has a time limit, after which the host counts as lost.
"""

from __future__ import annotations

import json
import os
import queue
import shlex
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any

MARK = "@lander "
"""Begins the probe's answers: login scripts and libraries write to standard output too."""

NO_DIRECTORY, NO_INTERPRETER = 91, 92
SSH_FAILED = 255
CLOSE_SECONDS = 5.0
IDLE_SECONDS = 30.0
"""How much longer than a question may take the probe waits for the next one."""

Answer = dict[str, Any]

_SSH_FAULTS = (
    (
        "Host key verification failed",
        "the host's key is not known here",
        "log in once by hand, or add the key with ssh-keyscan",
    ),
    (
        "REMOTE HOST IDENTIFICATION HAS CHANGED",
        "the host's key has changed",
        "if the host was set up anew, remove the old key with ssh-keygen -R",
    ),
    (
        "Permission denied",
        "ssh may not log in without a password",
        "put this user's public key into ~/.ssh/authorized_keys there",
    ),
    (
        "Could not resolve hostname",
        "nobody knows the name",
        "correct the name in the hostfile, or add it to /etc/hosts or ~/.ssh/config",
    ),
    ("Connection refused", "no sshd listens there", "start sshd there, or name its port with --ssh-port"),
    ("timed out", "no answer", "is the host up, its cable in, and no firewall between?"),
    ("No route to host", "no way leads there", "is the host up, and in a network that this machine reaches?"),
    ("Network is unreachable", "no way leads there", "check this machine's network"),
)


class HostLost(Exception):
    """A host does not answer, or its probe ended."""

    def __init__(self, check: str, detail: str, cure: str) -> None:
        super().__init__(detail)
        self.check, self.detail, self.cure = check, detail, cure


@dataclass(frozen=True)
class Access:
    """How a probe is started."""

    interpreter: str
    """Python, the same path on every host."""
    directory: str
    """Working directory, the same on every host."""
    ssh: tuple[str, ...] | None = ("ssh",)
    """ssh and its options; None: on this machine."""
    port: int | None = None
    """Of sshd; default: what ssh's configuration says."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Set there, as the launcher will set them."""
    seconds: float = 60.0
    """How long one question may take."""

    def command(self, host: str) -> list[str]:
        """The command that starts the probe on `host`."""
        settings = " ".join(shlex.quote(f"{name}={value}") for name, value in self.variables.items())
        python = shlex.quote(self.interpreter)
        script = (
            f"cd {shlex.quote(self.directory)} || exit {NO_DIRECTORY}; test -x {python} || exit {NO_INTERPRETER}; "
            f"exec env {settings} {python} -m lander_ds.cluster.doctor.probe {self.seconds + IDLE_SECONDS:g}"
        )
        if self.ssh is None:
            return ["sh", "-c", script]
        return [*self.ssh, *ssh_options(self.seconds, self.port), host, script]


def ssh_options(seconds: float, port: int | None) -> list[str]:
    """Options of ssh with which it asks nothing, and notices hosts that have gone."""
    options = {
        "BatchMode": "yes",
        "ConnectTimeout": f"{max(1, min(10, int(seconds)))}",
        "ServerAliveInterval": "5",
        "ServerAliveCountMax": "3",
    }
    named = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
    return [*named, *(() if port is None else ("-p", str(port)))]


class Connection:
    """One host's probe."""

    def __init__(self, host: str, access: Access) -> None:
        """Start the probe; whether that went well shows with the first question.

        Args:
            host: its name.
            access: how to get there.

        Raises:
            HostLost: ssh itself is not there.
        """
        self.host, self._access = host, access
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._answered = False
        self._complaints: deque[str] = deque(maxlen=40)
        try:
            # A session of its own: Ctrl-C reaches this process alone, which then ends the conversation.
            self._process = subprocess.Popen(
                access.command(host),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            raise HostLost(
                "ssh", f"ssh cannot be started ({error})", "install ssh, or correct --ssh"
            ) from None
        self._threads = [
            threading.Thread(target=self._listen, args=(self._process.stdout,), daemon=True),
            threading.Thread(target=self._note, args=(self._process.stderr,), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def ask(self, question: str, within: float | None = None, **arguments: Any) -> Answer:
        """Put a question to the probe (a method of `probe.Probe`) and wait for the answer.

        Args:
            question: its name.
            within: how long to wait, in seconds; default: as long as the way says.
            arguments: JSON values.

        Raises:
            HostLost: no answer in time, or the probe ended.
        """
        seconds = self._access.seconds if within is None else within
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"question": question, **arguments}) + "\n")
            self._process.stdin.flush()
        except (OSError, ValueError):
            raise self._why_it_ended() from None
        try:
            line = self._answers.get(timeout=seconds)
        except queue.Empty:
            self.close(patience=0.0)
            raise HostLost(
                "ssh" if question == "hello" else "probe",
                f"no answer to '{question}' within {seconds:g} s",
                "is the host up and not overloaded, and do all its file systems answer? --timeout allows more time",
            ) from None
        if line is None:
            raise self._why_it_ended()
        self._answered = True
        answer: Answer = json.loads(line)
        return answer

    def hang_up(self) -> None:
        """Close the probe's standard input: it cleans up and goes."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()

    def close(self, patience: float = CLOSE_SECONDS) -> None:
        """End the conversation. Whoever does not go in time is killed here; over there, the probe ends by itself."""
        self.hang_up()
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _listen(self, stream: IO[str]) -> None:
        for line in stream:
            if line.startswith(MARK):
                self._answers.put(line.removeprefix(MARK))
        self._answers.put(None)

    def _note(self, stream: IO[str]) -> None:
        self._complaints.extend(line for line in map(str.strip, stream) if line)

    def _why_it_ended(self) -> HostLost:
        """What the exit code and standard error say."""
        self.close()
        for thread in self._threads:
            thread.join(1.0)
        code, complaints = self._process.returncode, list(self._complaints)
        last = complaints[-1] if complaints else "it says nothing"
        if code == NO_DIRECTORY:
            return HostLost(
                "directory",
                f"{self._access.directory} is no directory there",
                "start from a directory that all hosts share, or make the same one there",
            )
        if code == NO_INTERPRETER:
            return HostLost(
                "interpreter",
                f"{self._access.interpreter} is not there",
                "install Python and requirements.txt there under the same path: DeepSpeed starts that path on every host",
            )
        if code == SSH_FAILED and self._access.ssh is not None:
            return self._why_ssh_failed(complaints)
        if "No module named" in last:
            return HostLost(
                "code",
                f"the probe cannot be imported there ({last})",
                "install the same lander_ds and requirements there",
            )
        return HostLost(
            "probe",
            f"the probe ended with exit code {code} ({last})",
            "see that Python and PyTorch work there",
        )

    def _why_ssh_failed(self, complaints: Sequence[str]) -> HostLost:
        for sign, what, cure in _SSH_FAULTS:
            if line := next((line for line in complaints if sign in line), None):
                return HostLost("ssh", f"{what} ({line})", cure)
        if self._answered:
            return HostLost("ssh", "the connection broke", "is the host up, its cable in, and sshd running?")
        last = complaints[-1] if complaints else "it says nothing"
        return HostLost("ssh", f"ssh failed ({last})", f"try it by hand: ssh {self.host} hostname")


@dataclass(frozen=True)
class Reply:
    """An answer, and how long it took."""

    answer: Answer
    sent: float
    """This machine's clock (seconds since 1970) when the question went out."""
    received: float


def timed(connection: Connection, question: str) -> Reply:
    """Ask and look at this machine's clock before and after.

    Raises:
        HostLost: as `Connection.ask`.
    """
    sent = time.time()
    answer = connection.ask(question)
    return Reply(answer, sent, time.time())
