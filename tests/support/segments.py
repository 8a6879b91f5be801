"""The examples of a packed row, from their lengths."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from lander_ds.models.attention import Segments


def segments_of(lengths: Sequence[int]) -> Segments:
    """Examples of these lengths, on the CPU."""
    return Segments(tuple(lengths), torch.tensor([0, *accumulate(lengths)], dtype=torch.int32))
