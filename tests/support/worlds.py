"""Worlds of several gloo ranks for tests and benchmarks: started once, many jobs inside, all results on disk."""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Protocol

from lander_ds.distributed.process_group import free_port
from lander_ds.stages.catalogue import STAGES

TIMEOUT_SECONDS = 240.0
"""For the start and one job: a world of many jobs takes longer on a busy machine."""
PRELOADED = (
    "deepspeed",
    "transformers",
    "peft",
    "torch._inductor.compile_fx",
    "torch.utils.tensorboard",
    "lander_ds.cli.main",
    "lander_ds.cli.stages",
    *(f"lander_ds.stages.{name}" for name in STAGES),
)
"""What every rank would import by itself otherwise, in seconds each."""


class Work(Protocol):
    """What a world does at one go, on every rank; it must be possible to pickle it."""

    @property
    def name(self) -> str:
        """For messages; no other work of the world has it."""

    def __call__(self, root: Path, ranks: int) -> None:
        """Do it (collective); results go to files below `root`."""


@dataclass(frozen=True)
class Job:
    """One call on every rank, in a run directory of its own, of the run in miniature in `root`."""

    name: str
    """Its run directory is `<name>-<ranks>`."""
    overrides: tuple[str, ...] = ()
    """`--set` arguments."""
    call: str = "lander_ds.stages.train:run"
    """`module:function` with the arguments (recipe, run directory)."""

    def __call__(self, root: Path, ranks: int) -> None:
        """Make the run directory and call the function."""
        from lander_ds.distributed import collectives, process_group
        from support.tiny_run import TinyRun

        built, name = TinyRun(root), f"{self.name}-{ranks}"
        if process_group.rank() == 0:
            built.run(name)
        collectives.barrier()
        module, function = self.call.split(":")
        getattr(import_module(module), function)(built.recipe(name, *self.overrides), built.run(name))


def server() -> ForkServerContext:
    """Starts processes by forking a server that has imported everything once: in milliseconds."""
    context = get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def run_world(
    root: Path, ranks: int, jobs: Sequence[Work], threads: int = 1, timeout: float = TIMEOUT_SECONDS
) -> None:
    """Run the jobs one after another in a world of `ranks` processes.

    Args:
        root: where the ranks note what they have done, and results go.
        ranks: number of processes.
        jobs: what they do.
        threads: per process.
        timeout: seconds for the start and for each job.

    Raises:
        RuntimeError: a rank failed or did not end in time; the message holds its traceback.
    """
    context = server()
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    port = free_port()
    processes = [
        context.Process(
            target=_rank, args=(root, rank, ranks, port, threads, timeout, tuple(jobs)), daemon=True
        )
        for rank in range(ranks)
    ]
    try:
        for process in processes:
            process.start()
        _wait(root, processes, ranks, timeout)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def compilation() -> dict[str, str]:
    """Environment variables with which DeepSpeed's kernels are compiled in little time, apart from those that a user has.

    The tools of the virtual environment come first: another ninja would compile everything again.
    """
    return {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "CXX": str(Path(__file__).with_name("quick-g++")),
        "TORCH_EXTENSIONS_DIR": str(Path(tempfile.gettempdir()) / f"lander-ds-test-kernels-{os.getuid()}"),
    }


def _wait(root: Path, processes: Sequence[object], ranks: int, timeout: float) -> None:
    done, deadline = -1, 0.0
    while any(process.is_alive() for process in processes):  # type: ignore[attr-defined]
        before, done = done, len(list(root.glob(f"done-{ranks}-*")))
        if done != before:
            deadline = time.monotonic() + timeout
        if any(process.exitcode for process in processes) or time.monotonic() > deadline:  # type: ignore[attr-defined]
            break
        time.sleep(0.05)
    if all(process.exitcode == 0 for process in processes):  # type: ignore[attr-defined]
        return
    wording = [path.read_text() for path in sorted(root.glob(f"failure-{ranks}-*.txt"))]
    raise RuntimeError("\n".join(wording) or f"a world of {ranks} ranks did not end a job in {timeout} s")


def _rank(
    root: Path, rank: int, ranks: int, port: int, threads: int, timeout: float, jobs: tuple[Work, ...]
) -> None:
    import gc

    import torch

    # What the server has imported stays shared, and out of every collection.
    gc.freeze()
    torch.set_num_threads(threads)
    # In bfloat16 it compiles a kernel for every new shape, which takes longer than all that these ranks compute.
    torch.backends.mkldnn.set_flags(False)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        **compilation(),
    )
    from lander_ds.distributed import collectives, process_group

    placement = "start"
    try:
        process_group.start(timeout)
        for job in jobs:
            placement = job.name
            job(root, ranks)
            collectives.barrier()
            if rank == 0:
                (root / f"done-{ranks}-{job.name}").touch()
        process_group.stop()
    except BaseException:
        text = f"job {placement}, rank {rank} of {ranks}:\n{traceback.format_exc()}"
        (root / f"failure-{ranks}-{rank}.txt").write_text(text)
        # Other ranks may wait for this one: an orderly exit could hang.
        os._exit(1)
