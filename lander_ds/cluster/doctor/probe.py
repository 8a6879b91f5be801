"""The remote side of `lander doctor`: started on every host with `python -m lander_ds.cluster.doctor.probe`.

Reads questions from standard input and writes one JSON object per answer. It ends, and takes with it what it
made, when standard input ends or no question came for a while. It must start where PyTorch does not, so it imports
the standard library alone; see `inspection` for the rest.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from lander_ds.cluster.doctor.inspection import inspect
from lander_ds.cluster.doctor.ranks import Ranks
from lander_ds.cluster.doctor.remote import MARK
from lander_ds.cluster.doctor.shared import Tokens

CONNECT_SECONDS = 5.0
STDIN = 0


class Probe:
    """What one host is asked; every public method is a question with its arguments, and returns JSON values."""

    def __init__(self) -> None:
        self._tokens = Tokens()
        self._ranks = Ranks()
        self._listener: socket.socket | None = None

    def hello(self) -> dict[str, Any]:
        """Who is there."""
        return {"hostname": socket.gethostname(), "python": sys.executable, "directory": os.getcwd()}

    def clock(self) -> dict[str, Any]:
        """Seconds since 1970, by this host's clock."""
        return {"time": time.time()}

    def look(
        self, recipe: str | None, overrides: list[str], ranks: list[int] | None, address: str | None
    ) -> dict[str, Any]:
        """Everything that can be seen without the other hosts; see `inspection.inspect`."""
        return inspect(None if recipe is None else Path(recipe), overrides, ranks, address)

    def listen(self, port: int, token: str) -> dict[str, Any]:
        """Wait for connections at the rendezvous port, and greet them with `token`."""
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("", port))
            listener.listen(1024)
        except OSError as error:
            listener.close()
            return {"error": error.strerror or str(error)}
        self._listener = listener
        threading.Thread(target=_greet, args=(listener, token.encode()), daemon=True).start()
        return {"error": None}

    def connect(self, address: str, port: int, token: str) -> dict[str, Any]:
        """Connect to the rendezvous port as a rank will, and see that the right host answers."""
        began = time.monotonic()
        try:
            with socket.create_connection((address, port), timeout=CONNECT_SECONDS) as connection:
                connection.settimeout(CONNECT_SECONDS)
                greeting = connection.makefile("rb").readline().decode(errors="replace").strip()
        except OSError as error:
            return {"error": str(error)}
        if greeting != token:
            return {"error": f"another machine or program answers at {address}:{port}"}
        return {"error": None, "seconds": time.monotonic() - began}

    def unlisten(self) -> dict[str, Any]:
        """Give the rendezvous port back."""
        if self._listener is not None:
            # Wakes the thread that accepts, which would keep the port open.
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        return {}

    def put_token(self, directory: str, token: str) -> dict[str, Any]:
        """Leave a file with `token` in a shared directory."""
        return self._tokens.put(Path(directory), token)

    def find_token(self, directory: str, token: str) -> dict[str, Any]:
        """Whether the file that another host left is seen here, and one can be written here."""
        return self._tokens.find(Path(directory), token)

    def remove_tokens(self) -> dict[str, Any]:
        """Delete what `put_token` wrote."""
        self._tokens.remove()
        return {}

    def run_ranks(self, **arguments: Any) -> dict[str, Any]:
        """Run ranks of the communication test; see `ranks.Ranks.run`."""
        return self._ranks.run(**arguments)

    def leave(self) -> NoReturn:
        """Clean up and end."""
        self._ranks.kill()
        self._tokens.remove()
        os._exit(0)


def _greet(listener: socket.socket, token: bytes) -> None:
    while True:
        try:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(token + b"\n")
        except ConnectionError:
            continue
        except OSError:
            return


def answer(probe: Probe, question: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to one question; what goes wrong is told as `error`."""
    asked: Callable[..., dict[str, Any]] = getattr(probe, question)
    try:
        return asked(**arguments)
    except Exception as error:
        # Of any kind: a host with a broken installation is what this looks for.
        return {"error": f"{type(error).__name__}: {error}"}


def main() -> NoReturn:
    """Answer until standard input ends."""
    idle_seconds = float(sys.argv[1])
    # Libraries print to standard output; answers have it for themselves.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    probe = Probe()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, lambda *_: probe.leave())
    questions = _Questions(probe, idle_seconds)
    while True:
        arguments = questions.next()
        reply = answer(probe, arguments.pop("question"), arguments)
        try:
            answers.write(f"{MARK}{json.dumps(reply)}\n")
            answers.flush()
        except OSError:
            probe.leave()
        questions.answered()


class _Questions:
    """Reads standard input in a thread of its own, so that its end is noticed while a question is being answered."""

    def __init__(self, probe: Probe, idle_seconds: float) -> None:
        self._probe, self._idle = probe, idle_seconds
        self._waiting: list[dict[str, Any]] = []
        self._news = threading.Condition()
        self._since = time.monotonic()
        threading.Thread(target=self._read, daemon=True).start()

    def next(self) -> dict[str, Any]:
        """The next question."""
        with self._news:
            while not self._waiting:
                self._news.wait()
            return self._waiting.pop(0)

    def answered(self) -> None:
        """Begin to count idle time anew."""
        self._since = time.monotonic()

    def _read(self) -> NoReturn:
        rest = b""
        while True:
            ready, _, _ = select.select([STDIN], [], [], 1.0)
            if not ready and time.monotonic() - self._since > self._idle:
                self._probe.leave()
            if not ready:
                continue
            received = os.read(STDIN, 1 << 16)
            if not received:
                self._probe.leave()
            *lines, rest = (rest + received).split(b"\n")
            with self._news:
                self._waiting += [json.loads(line) for line in lines]
                self._news.notify()
                self._since = time.monotonic()


if __name__ == "__main__":
    main()
