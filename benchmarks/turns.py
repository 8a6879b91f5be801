"""One step at a time: processes that hold a system take their turns, so that only one of them computes.

A *system* is one way to train. Each has a group of rank processes of its own, which stay alive for the whole run and
wait in a read from a pipe, without a pending collective and without using the processor, until it is their turn.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from lander_ds.distributed.process_group import free_port

READY, GO = "ready", "go"
LAST_LINES = 25


class SystemFailed(Exception):
    """A rank process of a system has ended before its work was done."""


@dataclass(frozen=True)
class StepTime:
    """What a step took."""

    seconds: float
    """On the clock; of a group: of its slowest rank."""
    processor_seconds: float
    """Of all threads, in user and system mode; of a group: of all ranks together. Other processes on the machine
    disturb it much less."""


@dataclass(frozen=True)
class Facts:
    """What a rank knows about its system when all steps are done."""

    trained_parameters: int
    total_parameters: int
    first_loss: float
    """Loss of the first step, in nats per target token: equal for all systems that start at the base model."""
    peak_bytes: int
    """Most resident memory of this rank during its steps."""
    peak_since: str
    """`steps`: loading the model is not counted in `peak_bytes`. `start`: this system cannot leave it out."""
    profile: str = ""
    """Table of operators, when one was asked for."""


class Turns:
    """A rank's side: `next` is called before every step and once after the last."""

    def __init__(self, connection: Connection, steps: int, profile: bool = False) -> None:
        """Follow `connection` for `steps` steps; `profile`: record the operators of the last one."""
        self._connection, self._steps = connection, steps
        self._done, self._begun, self._begun_processor = 0, 0.0, 0.0
        self._profile = profile
        self._profiler: Any = None
        self.peak_since = "steps"

    def next(self) -> None:
        """Report the step that has just ended, if one has, and wait for the next turn, if there is one."""
        if self._begun:
            seconds = time.perf_counter() - self._begun
            self._connection.send(StepTime(seconds, time.process_time() - self._begun_processor))
            self._done += 1
        else:
            self._forget_peak_memory()
            self._connection.send(READY)
        if self._done == self._steps:
            if self._profiler is not None:
                self._profiler.stop()
            return
        if self._profile and self._done == self._steps - 1:
            self._start_profiler()
        self._connection.recv()
        self._begun, self._begun_processor = time.perf_counter(), time.process_time()

    def finish(self, trained_parameters: int, total_parameters: int, first_loss: float) -> None:
        """Hand over the facts after the last step."""
        table = ""
        if self._profiler is not None:
            averages = self._profiler.key_averages()
            table = averages.table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=60)
        facts = Facts(
            trained_parameters, total_parameters, first_loss, _peak_memory(), self.peak_since, table
        )
        self._connection.send(facts)

    def _forget_peak_memory(self) -> None:
        """Make the present memory the peak (Linux; see proc(5))."""
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self.peak_since = "start"

    def _start_profiler(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        self._profiler = profile(activities=[ProfilerActivity.CPU])
        self._profiler.start()


def _peak_memory() -> int:
    """Bytes of this process's largest resident set since it was last forgotten."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "VmHWM":
            return int(value.split()[0]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM: this benchmark needs Linux")


Work = Callable[[Turns], None]


def _rank_process(
    connection: Connection, log: Path, environment: dict[str, str], work: Work, steps: int, profile: bool
) -> None:
    # DeepSpeed and transformers talk on both streams.
    stream = log.open("ab")
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    os.environ.update(environment)
    work(Turns(connection, steps, profile))


class Group:
    """The coordinator's side: the rank processes of one system."""

    def __init__(
        self, name: str, work: Work, ranks: int, steps: int, directory: Path, profile: bool = False
    ) -> None:
        """Start the processes.

        Args:
            name: of the system.
            work: what each rank does; it must be picklable.
            ranks: how many processes.
            steps: turns each will get.
            directory: where their output is written.
            profile: record the operators of the last step.
        """
        self.name = name
        self._log = directory / f"{name}.log"
        context = multiprocessing.get_context("spawn")
        common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(ranks):
            here, there = context.Pipe()
            environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            arguments = (there, self._log, environment, work, steps, profile and rank == 0)
            process = context.Process(target=_rank_process, args=arguments, daemon=True)
            process.start()
            there.close()
            self._connections.append(here)
            self._processes.append(process)

    def wait_until_ready(self) -> None:
        """Return when every rank waits for its first turn."""
        self._receive()

    def step(self) -> StepTime:
        """Let the system take a step."""
        for connection in self._connections:
            connection.send(GO)
        times: list[StepTime] = self._receive()
        return StepTime(
            max(taken.seconds for taken in times), sum(taken.processor_seconds for taken in times)
        )

    def facts(self) -> list[Facts]:
        """By rank, after the last step."""
        return self._receive()

    def stop(self) -> None:
        """End the processes, done or not."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(5.0)
            if process.is_alive():
                process.kill()
                process.join()

    def _receive(self) -> list[Any]:
        """One message of every rank."""
        received: dict[Connection, Any] = {}
        while len(received) < len(self._connections):
            for ready in wait([c for c in self._connections if c not in received]):
                assert isinstance(ready, Connection)
                try:
                    received[ready] = ready.recv()
                except (EOFError, ConnectionResetError):
                    raise SystemFailed(f"{self.name} has failed; its last output:\n{self._tail()}") from None
        return [received[connection] for connection in self._connections]

    def _tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-LAST_LINES:])
