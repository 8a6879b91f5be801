"""Starting this host's ranks of the communication test and waiting for what they measure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import IO, Any

from lander_ds.cluster.doctor.remote import MARK

POLL_SECONDS = 0.05
OF_A_LAUNCHER = ("LOCAL_SIZE", "TORCHELASTIC_USE_AGENT_STORE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""Variables by which a rank would believe it was started by something else."""


@dataclass(frozen=True)
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    output: IO[str]
    complaints: IO[str]


class Ranks:
    """At most one set of ranks at a time."""

    def __init__(self) -> None:
        self._running: list[_Rank] = []

    def run(
        self, first: int, count: int, world: int, leaders: list[int], address: str, port: int, limit: float
    ) -> dict[str, Any]:
        """Run ranks `first` to `first + count - 1` of `doctor.bandwidth`.

        Args:
            first, count: the ranks of this host.
            world: ranks on all hosts.
            leaders: ranks that measure point-to-point.
            address, port: where they meet.
            limit: seconds after which they are killed.

        Returns: `ranks`: what each printed last, or `error`.
        """
        deadline = time.monotonic() + limit
        try:
            for local in range(count):
                self._start(first + local, local, world, leaders, address, port, limit)
            while any(rank.process.poll() is None for rank in self._running) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
            return {"ranks": [_outcome(rank) for rank in self._running]}
        finally:
            self.kill()

    def kill(self) -> None:
        """End what still runs."""
        for rank in self._running:
            rank.process.kill()
            rank.process.wait()
        self._running = []

    def _start(
        self, number: int, local: int, world: int, leaders: list[int], address: str, port: int, limit: float
    ) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in OF_A_LAUNCHER}
        environment.update(
            RANK=str(number),
            LOCAL_RANK=str(local),
            WORLD_SIZE=str(world),
            MASTER_ADDR=address,
            MASTER_PORT=str(port),
        )
        environment.setdefault("OMP_NUM_THREADS", "1")
        # Files, because a pipe that nobody reads stops the rank when it is full. `_outcome` closes them.
        output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        complaints = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        command = [
            sys.executable,
            "-m",
            "lander_ds.cluster.doctor.bandwidth",
            json.dumps(leaders),
            f"{limit:g}",
        ]
        # The rank ends when this process does, because its standard input ends then.
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=complaints, env=environment
        )
        self._running.append(_Rank(number, process, output, complaints))


def _outcome(rank: _Rank) -> dict[str, Any]:
    """The last thing that a rank told; `error` where that is not its result."""
    code = rank.process.poll()
    for stream in (rank.output, rank.complaints):
        stream.seek(0)
    reports = [line.removeprefix(MARK) for line in rank.output if line.startswith(MARK)]
    last: dict[str, Any] = json.loads(reports[-1]) if reports else {"doing": "starting"}
    if "all_reduce" not in last and "error" not in last:
        lines = [line.strip() for line in rank.complaints if line.strip()]
        why = (
            "still at it when time was up"
            if code is None
            else f"exit code {code}: {lines[-1] if lines else 'silent'}"
        )
        last["error"] = why
    for stream in (rank.output, rank.complaints):
        stream.close()
    return {"rank": rank.number, **last}
