"""SIGTERM and SIGUSR1: a note during training, the end at once outside of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from lander_ds.training.preemption import SIGNALS, Preempted, StopRequest

NAMES = [number.name for number in SIGNALS]


def test_the_signals_of_clusters() -> None:
    assert set(NAMES) == {"SIGTERM", "SIGUSR1"}
    assert Preempted.exit_code == 75


@pytest.mark.parametrize("number", SIGNALS, ids=NAMES)
def test_a_signal_is_only_noted(number: signal.Signals) -> None:
    with StopRequest() as stop:
        assert not stop.received
        os.kill(os.getpid(), number)
        assert stop.received
        # And again: impatient clusters send several.
        os.kill(os.getpid(), number)
        assert stop.received


def test_the_handlers_of_before_are_back_afterwards() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGUSR1)
        assert seen == []
        os.kill(os.getpid(), signal.SIGUSR1)
        assert seen == [signal.SIGUSR1]
        with pytest.raises(RuntimeError), StopRequest():
            raise RuntimeError
        os.kill(os.getpid(), signal.SIGUSR1)
        assert len(seen) == 2
        assert stop.received
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_training_in_another_thread_leaves_the_signals_alone() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    inside: list[object] = []

    def train() -> None:
        with StopRequest() as stop:
            inside.extend(signal.getsignal(number) for number in SIGNALS)
            assert not stop.received

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert inside == before


WAITING = """
import time
from lander_ds.training.preemption import StopRequest, leave_at_once
leave_at_once()
{training}print("ready", flush=True)
time.sleep(30)
"""


@pytest.mark.parametrize("number", SIGNALS, ids=NAMES)
@pytest.mark.parametrize("training", ["", "with StopRequest(): pass\n"], ids=["before", "after"])
def test_outside_of_training_the_process_ends_with_the_same_code(
    number: signal.Signals, training: str
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING.format(training=training)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.wait(60) == Preempted.exit_code
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
