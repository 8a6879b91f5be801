"""The process group: started through DeepSpeed, on one process and on many, so that every stage runs the same code path.

One process without a launcher is a world of size 1 and needs no process group for anything but ZeRO.
"""

from __future__ import annotations

import gc
import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist

from lander_ds.distributed import discovery


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


def free_memory() -> None:
    """Let go of models that only reference cycles still hold, as DeepSpeed's engines do after their end."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
