"""What a host's PyTorch sees of its accelerators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lander_ds.distributed import vectors


def accelerator() -> dict[str, Any]:
    """GPUs with their memory (bytes), the libraries that ranks communicate with, and the vectors of the processor."""
    cards = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        cards.append({"name": torch.cuda.get_device_name(index), "memory": total, "free": free})
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if cards else None  # type: ignore[no-untyped-call]
    return {
        "cards": cards,
        "driver": Path("/proc/driver/nvidia").exists(),
        "cuda": torch.version.cuda,
        "nccl": nccl if dist.is_nccl_available() else None,
        "gloo": dist.is_gloo_available(),
        "vectors": vectors.widest(),
    }
