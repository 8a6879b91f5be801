"""The device that this rank computes on, through DeepSpeed's accelerator interface: CUDA, ROCm, XPU, NPU, ... or the CPU.

`bind` comes before anything that the ranks do together: NCCL takes the current device of the process for the first
exchange of objects, and without it that would be device 0 on every rank.
"""

from __future__ import annotations

import gc
import os
import resource
import socket

import torch
from deepspeed.accelerator import get_accelerator

from lander_ds.common import launch
from lander_ds.common.errors import ConfigError

_LOCAL_RANKS = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
"""What DeepSpeed takes for the number of its device; it wants them alike."""


def kind() -> str:
    """Type of the devices in PyTorch's words: cpu, cuda, xpu, ..."""
    return str(get_accelerator().device_name())


def is_cpu() -> bool:
    """Whether ranks compute on the CPU."""
    return kind() == "cpu"


def bind() -> None:
    """Make one device of this host the current one of this process, and LOCAL_RANK its number.

    A launcher that shows each rank its own device alone (SLURM's --gpus-per-task) numbers it 0 on all of them.

    Raises:
        ConfigError: this host has more ranks than devices.
    """
    if is_cpu():
        return
    devices, rank = get_accelerator().device_count(), launch.local_rank()
    number = 0 if devices == 1 else rank
    if number >= devices:
        raise ConfigError(
            f"{socket.gethostname()}: this is local rank {rank} of a host that shows {devices} {kind()} devices: start as "
            "many ranks as there are devices, or show more (CUDA_VISIBLE_DEVICES)"
        )
    for variable in _LOCAL_RANKS:
        if variable == "LOCAL_RANK" or variable in os.environ:
            os.environ[variable] = str(number)
    get_accelerator().set_device(number)


def device() -> torch.device:
    """The device of this rank; on all but the CPU the one that `bind` has chosen."""
    if is_cpu():
        return torch.device("cpu")
    return torch.device(get_accelerator().current_device_name())


def free_memory() -> None:
    """Let go of models that only reference cycles still hold, as DeepSpeed's engines do after their end."""
    gc.collect()
    get_accelerator().empty_cache()


def peak_memory() -> int:
    """The most memory this process has held, in bytes: of its device, or resident on a CPU."""
    if is_cpu():
        # Linux counts in KiB.
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(get_accelerator().max_memory_allocated())
