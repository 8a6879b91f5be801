"""Few sizes instead of many: libraries compile kernels, and allocators look for room, anew for every size they meet."""

from __future__ import annotations


def rounded_up(count: int) -> int:
    """The next of 16 sizes between two powers of two: at most a sixteenth is added."""
    step = 1 << max(0, count.bit_length() - 5)
    return -(-count // step) * step
