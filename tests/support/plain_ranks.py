"""Ranks that run one function in a gloo group, without DeepSpeed: for what must be killed, or must end by itself."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from support.worlds import server

TIMEOUT_SECONDS = 60.0


class PlainRanks:
    """Processes that run a function of a module; what they write goes to a file."""

    def __init__(
        self, directory: Path, function: Callable[..., object], *arguments: Any, ranks: int = 2
    ) -> None:
        """Start them; `directory` is for the output and for finding one another."""
        context = server()
        name = uuid.uuid4().hex
        self._log = directory / f"output-{name}.txt"
        gathering = directory / f"meeting-{name}"
        self.processes: list[BaseProcess] = [
            context.Process(target=_rank, args=(rank, ranks, gathering, self._log, function, arguments))
            for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()

    def wait(self) -> list[int | None]:
        """The exit codes by rank; what does not end is killed."""
        for process in self.processes:
            process.join(TIMEOUT_SECONDS)
        return self.kill()

    def kill(self) -> list[int | None]:
        """Kill all; the exit codes by rank."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        return [process.exitcode for process in self.processes]

    @property
    def output(self) -> str:
        """What they have written."""
        return self._log.read_text() if self._log.exists() else ""


def _rank(
    rank: int, ranks: int, gathering: Path, log: Path, function: Callable[..., object], arguments: Any
) -> None:
    import torch.distributed as dist

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks))
    from lander_ds.common import console

    console.setup_logging()
    if ranks > 1:
        dist.init_process_group("gloo", f"file://{gathering}", rank=rank, world_size=ranks)
    function(*arguments)
    sys.stderr.flush()
    # Not in good order: another rank may be gone.
    os._exit(0)
