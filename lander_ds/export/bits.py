"""Differences of tensors as bit patterns: old XOR new. Applied to the old it gives the new, applied to the new the
old, bit by bit, for every type and for values such as NaN and -0 too.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from lander_ds.export.stream import raw

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
INDEX_DTYPE = torch.int32


def pattern(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers of the same width."""
    return tensor.view(_INTEGERS[tensor.element_size()])


def tensor_hash(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes (hex)."""
    return hashlib.sha256(raw(tensor)).hexdigest()


@dataclass(frozen=True)
class Slices:
    """Rows or columns of a tensor, or all of it."""

    dim: int | None
    """Dimension that `index` counts along; None: the whole tensor."""
    index: torch.Tensor | None
    """[n] int32, ascending."""

    def cut(self, tensor: torch.Tensor) -> torch.Tensor:
        """That part of a tensor."""
        if self.dim is None or self.index is None:
            return tensor
        return tensor.index_select(self.dim, self.index)


def difference(old: torch.Tensor, new: torch.Tensor) -> Slices | None:
    """The smallest set of rows or of columns outside of which two tensors are the same; None: they are equal.

    Args:
        old, new: of the same shape and type.
    """
    differ = pattern(old.contiguous()) != pattern(new.contiguous())
    if not differ.any():
        return None
    best, best_bytes = Slices(None, None), old.numel() * old.element_size()
    for dim in range(min(2, old.dim())):
        others = [other for other in range(old.dim()) if other != dim]
        index = (differ.any(dim=others) if others else differ).nonzero().squeeze(-1).to(INDEX_DTYPE)
        slice_bytes = old.numel() // old.shape[dim] * old.element_size() + INDEX_DTYPE.itemsize
        if len(index) * slice_bytes < best_bytes:
            best, best_bytes = Slices(dim, index), len(index) * slice_bytes
    return best


def exclusive_or(old: torch.Tensor, new: torch.Tensor, slices: Slices) -> torch.Tensor:
    """Bit patterns that lead from `old` to `new` and back, at a place."""
    return pattern(slices.cut(old).contiguous()) ^ pattern(slices.cut(new).contiguous())


def flipped(tensor: torch.Tensor, bits: torch.Tensor, slices: Slices) -> torch.Tensor:
    """`tensor` with the bits at a place turned over."""
    result = tensor.clone(memory_format=torch.contiguous_format)
    patterns = pattern(result)
    if slices.dim is None or slices.index is None:
        patterns.bitwise_xor_(bits)
    else:
        patterns.index_copy_(slices.dim, slices.index.long(), pattern(slices.cut(tensor).contiguous()) ^ bits)
    return result
