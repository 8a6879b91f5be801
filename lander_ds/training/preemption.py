"""Requests to stop: SIGTERM and SIGUSR1, which clusters send before they take a machine away."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from lander_ds.common.errors import ExitCode, LanderError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(LanderError):
    """Training was asked to stop and has saved a checkpoint. Its exit code tells launch scripts to start it again."""

    exit_code = ExitCode.PREEMPTED
    label = "stopped"


def leave_at_once() -> None:
    """From now on the signals end this process with the exit code of `Preempted`: outside of training there is nothing
    to save, every stage goes on or begins again by itself."""
    for number in SIGNALS:
        signal.signal(number, lambda *_: os._exit(Preempted.exit_code))


class StopRequest:
    """Within this context the signals only leave a note; the training loop looks at it between steps."""

    def __init__(self) -> None:
        self.received = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        # Python allows handlers in the main thread alone; a training in another thread is stopped by other means.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True
