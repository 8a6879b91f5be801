"""The hosts that still answer. A question goes to all of them at once; whoever is lost over it is told and left out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

from lander_ds.cluster.doctor.finding import Finding, Status
from lander_ds.cluster.doctor.remote import CLOSE_SECONDS, Access, Answer, Connection, HostLost

T = TypeVar("T")

AT_ONCE = 128
"""Hosts that are asked at the same time."""


class Fleet:
    """Open connections to hosts, in the order of the hostfile; a context that closes them."""

    def __init__(self, findings: list[Finding]) -> None:
        """Nobody yet.

        Args:
            findings: where to note the hosts that are lost.
        """
        self._findings = findings
        self._connections: dict[str, Connection] = {}
        self._opened: list[Connection] = []
        self._pool = ThreadPoolExecutor(AT_ONCE)

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        # All at once, then one after the other: their time to go is the same.
        for connection in self._opened:
            connection.hang_up()
        deadline = time.monotonic() + CLOSE_SECONDS
        for connection in self._opened:
            connection.close(max(0.0, deadline - time.monotonic()))
        # Threads that wait for an answer know by now that none will come.
        self._pool.shutdown()

    @property
    def names(self) -> list[str]:
        """Hosts that answer."""
        return list(self._connections)

    def meet(self, names: Sequence[str], access: Access) -> dict[str, Answer]:
        """Start a probe on every host; those that answer are the fleet from now on."""

        def greet(name: str) -> tuple[Connection, Answer]:
            connection = Connection(name, access)
            self._opened.append(connection)
            return connection, connection.ask("hello")

        met = self._gather(greet, names)
        self._connections = {name: connection for name, (connection, _) in met.items()}
        return {name: answer for name, (_, answer) in met.items()}

    def ask(self, question: str, names: Sequence[str] | None = None, **arguments: Any) -> dict[str, Answer]:
        """The answers to one question by host; default: of all."""
        return self.each(lambda name, connection: connection.ask(question, **arguments), names)

    def each(self, ask: Callable[[str, Connection], T], names: Sequence[str] | None = None) -> dict[str, T]:
        """What `ask(name, connection)` returns, by host; default: of all."""
        known = [name for name in (self.names if names is None else names) if name in self._connections]
        return self._gather(lambda name: ask(name, self._connections[name]), known)

    def _gather(self, ask: Callable[[str], T], names: Sequence[str]) -> dict[str, T]:
        futures = {name: self._pool.submit(ask, name) for name in names}
        answers: dict[str, T] = {}
        for name, future in futures.items():
            try:
                answers[name] = future.result()
            except HostLost as lost:
                self.lose(name, lost)
        return answers

    def lose(self, name: str, lost: HostLost) -> None:
        """Leave a host out from now on, and say why."""
        self.add(lost.check, name, "fail", lost.detail, lost.cure)
        self._connections.pop(name, None)

    def add(self, check: str, host: str, status: Status, detail: str, cure: str = "") -> None:
        """Note what was found."""
        self._findings.append(Finding(check, host, status, detail, cure))
