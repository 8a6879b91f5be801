#!/usr/bin/env python
"""One rank of the parity benchmark: runs its list of jobs one after another in one process group.

    deepspeed --num_gpus 2 benchmarks/parity_ranks.py WORKSPACE JOBS.json

Facts that only a rank knows go to `rank-<rank>.json` in the run directory of their job.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import threading
import time
from pathlib import Path
from typing import Any

import torch
from parity_cases import Job, Workspace

from lander_ds.common import console
from lander_ds.common.run_directory import RunDirectory
from lander_ds.distributed import accelerator, collectives, process_group
from lander_ds.distributed.start import Start
from lander_ds.training.session import Session, open_session

SAMPLE_SECONDS = 0.002


class PeakMemory:
    """Anonymous memory of this process, watched by a thread: mapped files, which the kernel can drop, do not count."""

    def __enter__(self) -> PeakMemory:
        gc.collect()
        # What the allocator has kept of earlier jobs would hide what this one takes.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        self._start = self._most = anonymous_bytes()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            self._most = max(self._most, anonymous_bytes())

    @property
    def growth(self) -> int:
        """The most above the start, in bytes."""
        return self._most - self._start


def anonymous_bytes() -> int:
    """Resident memory of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/status does not tell RssAnon")


def own_bytes(session: Session) -> int:
    """Bytes of this rank's weights, counted tensor by tensor: shards, and whole tensors where the rank has them."""
    return sum(
        tensor.numel() * tensor.element_size()
        for parameter in session.model.parameters()
        for tensor in (parameter.data, getattr(parameter, "ds_tensor", None))
        if tensor is not None
    )


def hold(workspace: Workspace, job: Job, run: RunDirectory) -> dict[str, Any]:
    """Open a training, count what it holds, and how much memory that took at most."""
    with PeakMemory() as memory:
        session = open_session(Start(workspace.recipe(job), run))
    span, holding = session.model.span, session.engine.rank_bytes()
    facts = {
        "span": [span.start, span.stop],
        "weights": own_bytes(session),
        "gradients": holding.gradients,
        "optimizer": holding.optimizer,
        "peak": memory.growth,
    }
    session.engine.destroy()
    return facts


def work(workspace: Workspace, job: Job) -> None:
    """Run one job."""
    from lander_ds.stages import detect, train

    run = workspace.run(job)
    if process_group.rank() == 0:
        workspace.open_run(job)
    collectives.barrier()
    if job.what in ("train", "detect"):
        {"train": train, "detect": detect}[job.what].run(workspace.recipe(job), run)
    else:
        facts = hold(workspace, job, run)
        (run.path / f"rank-{process_group.rank()}.json").write_text(json.dumps(facts))
    accelerator.free_memory()
    collectives.barrier()


def main() -> None:
    """Run the jobs; every rank the same."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("jobs", type=Path)
    # The launcher adds --local_rank.
    options, _ = parser.parse_known_args()
    torch.set_num_threads(1)
    console.setup_logging()
    process_group.start(600.0)
    workspace = Workspace(options.workspace)
    for actual in json.loads(options.jobs.read_text()):
        job = Job.from_json(actual)
        started = time.monotonic()
        work(workspace, job)
        if process_group.rank() == 0:
            print(f"{job.name}: {time.monotonic() - started:.1f} s", flush=True)
    process_group.stop()


if __name__ == "__main__":
    main()
