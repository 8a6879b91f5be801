"""The process groups: of the compute device, started through DeepSpeed, for stages that every rank works on; of the CPU
alone, in which ranks wait while rank 0 works.

One process without a launcher is a world of size 1 and needs no process group for anything but ZeRO.
"""

from __future__ import annotations

import os
import secrets
import socket
from contextlib import suppress
from datetime import timedelta

import deepspeed
import torch.distributed as dist

from lander_ds.common import launch
from lander_ds.distributed import accelerator, discovery

COLLECTIVE_SECONDS = 1800.0
"""How long one collective may take, unless the watchdog is more patient."""

AFTER_WATCHDOG_SECONDS = 120.0
"""How much longer than the watchdog waits: NCCL ends the process at its time-out, and the verdict needs a while."""

WAIT_SECONDS = 24 * 3600.0
"""How long ranks wait for rank 0 where it works alone, such as on reading large corpora."""

_waiting: dist.ProcessGroup | None = None
"""Of the CPU, beside a group of the compute device, whose time limit is shorter."""

_patience = timedelta(seconds=COLLECTIVE_SECONDS)
"""How long a collective of the compute device may take."""

_divisions: dict[tuple[tuple[int, ...], ...], dist.ProcessGroup] = {}
"""How the ranks were divided -> the group of this rank's part. Each has connections and threads, so none is made twice."""


def start(timeout_seconds: float = COLLECTIVE_SECONDS) -> None:
    """Bind this rank's device and initialise torch.distributed through DeepSpeed (gloo on CPU, NCCL on GPU); does nothing
    when it already is.

    Without a launcher (no RANK and no MPI in the environment) a world of one process is made on a free port.

    Raises:
        ConfigError: the network that the ranks are to use is not there, or not clear (see discovery.py); or this host has
            more ranks than devices.
    """
    global _waiting, _patience  # noqa: PLW0603
    if dist.is_initialized():
        return
    if "RANK" not in os.environ and launch.mpi_size() is None:
        os.environ.update(
            {
                "RANK": "0",
                "LOCAL_RANK": "0",
                "WORLD_SIZE": "1",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(free_port()),
            }
        )
    _find_others()
    accelerator.bind()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _patience = timedelta(seconds=timeout_seconds)
    deepspeed.init_distributed(timeout=_patience, verbose=False)
    if world_size() > 1:
        _waiting = dist.new_group(backend="gloo", timeout=timedelta(seconds=WAIT_SECONDS))


def patience(stall_seconds: float) -> float:
    """Time limit of collectives that lets a watchdog of `stall_seconds` speak first; 0: there is none."""
    return (
        max(COLLECTIVE_SECONDS, stall_seconds + AFTER_WATCHDOG_SECONDS)
        if stall_seconds
        else COLLECTIVE_SECONDS
    )


def start_on_cpu() -> None:
    """Initialise torch.distributed with gloo alone, for stages in which rank 0 works and the other ranks wait.

    Raises:
        ConfigError: as `start`.
    """
    if not dist.is_initialized():
        _find_others()
        dist.init_process_group("gloo", timeout=timedelta(seconds=WAIT_SECONDS))


def _find_others() -> None:
    discovery.check_interfaces(
        "GLOO_SOCKET_IFNAME", *([] if accelerator.is_cpu() else ["NCCL_SOCKET_IFNAME"])
    )
    discovery.discover()
    discovery.choose_interface()
    # DeepSpeed's shared-memory all-reduce needs a C++ compiler at the first start and leaves 69 MB per rank in
    # /dev/shm after the run; gloo does the same work.
    os.environ.pop("LOCAL_SIZE", None)


def part_of(division: tuple[tuple[int, ...], ...]) -> dist.ProcessGroup:
    """The group, of the compute device, of those ranks that are in one part with this rank (collective).

    Args:
        division: every rank in one part; the same on all ranks.
    """
    if division not in _divisions:
        _divisions[division], _ = dist.new_subgroups_by_enumeration(  # type: ignore[no-untyped-call]
            [list(part) for part in division], timeout=_patience
        )
    return _divisions[division]


def wait_for_rank_zero() -> None:
    """Wait, on the CPU, until every rank is here; rank 0 may come a day later."""
    if world_size() > 1:
        dist.barrier(_waiting)


def stop() -> None:
    """Leave the process groups, if there are any."""
    global _waiting  # noqa: PLW0603
    if dist.is_initialized():
        dist.destroy_process_group()
    _waiting = None
    _divisions.clear()


def free_port() -> int:
    """A TCP port that was free a moment ago. It is none of those that Linux hands out by itself (from 32768 on), which a
    connection of any program may have taken by the time that somebody listens."""
    while True:
        port = 20000 + secrets.randbelow(12768)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def rank() -> int:
    """Global rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1
