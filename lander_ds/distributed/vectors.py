"""What the vectors of a processor can compute. On PyTorch alone: the doctor asks hosts where DeepSpeed may be missing."""

from __future__ import annotations

import torch


def widest() -> str:
    """The widest vectors that PyTorch uses on this processor: AVX2, AVX512, SVE256, ... or DEFAULT."""
    return str(torch.backends.cpu.get_cpu_capability())


def imitate(vectors: str, dtype: str) -> bool:
    """Whether arithmetic of a type has to be imitated: with AVX2, products of bfloat16 take about 6 times as long as those
    of float32 (torch 2.13.0, 2026-11-30).

    Args:
        vectors: as `widest` says.
        dtype: `model.dtype`.
    """
    return dtype != "float32" and vectors == "AVX2"
