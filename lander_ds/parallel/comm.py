"""Process groups: starting them, and the few collectives the stages use outside DeepSpeed's engine.

One process without a launcher is a world of size 1 and needs no process group for anything but ZeRO; `start` makes
one in both cases, so that every stage runs the same code path on one process and on many.
"""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lander_ds.parallel import discovery

T = TypeVar("T")


def start(timeout_seconds: float = 1800.0) -> None:
    """Initialise torch.distributed through DeepSpeed (gloo on CPU, NCCL on GPU); does nothing when it already is.

    Without a launcher (no RANK and no MPI in the environment) a world of one process is made on a free port.

    Raises:
        ConfigError: it is not clear which network the ranks are to use; see discovery.py.
    """
    if dist.is_initialized():
        return
    import deepspeed

    under_mpi = "OMPI_COMM_WORLD_SIZE" in os.environ or "PMI_SIZE" in os.environ
    if "RANK" not in os.environ and not under_mpi:
        os.environ.update(
            {
                "RANK": "0",
                "LOCAL_RANK": "0",
                "WORLD_SIZE": "1",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(free_port()),
            }
        )
    discovery.discover()
    discovery.choose_interface()
    # DeepSpeed's shared-memory all-reduce needs a C++ compiler at the first start and leaves 69 MB per rank in
    # /dev/shm after the run; gloo does the same work.
    os.environ.pop("LOCAL_SIZE", None)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(timeout=timedelta(seconds=timeout_seconds), verbose=False)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank() -> int:
    """Global rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    """The device this rank computes on."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.barrier()


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of `tensor` over all ranks, on every rank (in place; same shape)."""
    if world_size() > 1:
        moved = tensor.to(device())
        dist.all_reduce(moved)
        tensor.copy_(moved)
    return tensor


def gather_objects(value: T) -> list[T]:
    """`value` of every rank, in rank order, on every rank (pickled: small values between trusted ranks only)."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def from_rank_zero(value: T) -> T:
    """Rank 0's `value`, on every rank."""
    if world_size() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[no-any-return]


def free_memory() -> None:
    """Let go of models that only reference cycles still hold, as DeepSpeed's engines do after their end."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def share(items: Sequence[T]) -> Sequence[T]:
    """This rank's every world_size-th item, so that sorted items spread evenly over the ranks."""
    return items[rank() :: world_size()]
