"""Digests of tensors where they are: nothing is copied to the host, and the host does not wait."""

from __future__ import annotations

import torch

_AT_ONCE = 1 << 22
"""Elements that are turned into int64 at one time."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of an element -> integers with the same bits."""


@torch.no_grad()
def digest(tensor: torch.Tensor) -> torch.Tensor:
    """[] int64 on the tensor's device: the sum of a mixture of every element's bits and position (R, SplitMix64, Steele
    et al. 2014), modulo 2^64.

    A change of one element always shows; changes of several cancel with probability 2^-64. Against what happens, not
    against a forger.
    """
    flat = tensor.detach().reshape(-1).view(_INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for begin in range(0, len(flat), _AT_ONCE):
        part = flat[begin : begin + _AT_ONCE].to(torch.int64)
        positions = torch.arange(begin, begin + len(part), device=tensor.device)
        total += _mixed(part ^ _mixed(positions)).sum()
    return total


def _mixed(values: torch.Tensor) -> torch.Tensor:
    """A bijection of int64 in which every bit depends on every other; arithmetic wraps."""
    values = values + _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values = (values ^ _shifted(values, shift)) * _signed(factor)
    return values ^ _shifted(values, 31)


def _shifted(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Right shift that fills with zeros."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 with these 64 bits."""
    return value - (1 << 64) if value >= 1 << 63 else value
