"""The few collectives that are used outside DeepSpeed's engine; on one process they need no process group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lander_ds.distributed import accelerator, process_group

T = TypeVar("T")


def barrier() -> None:
    """Wait for every rank."""
    if process_group.world_size() > 1:
        dist.barrier()


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of `tensor` over all ranks, on every rank (in place; same shape)."""
    if process_group.world_size() > 1:
        moved = tensor.to(accelerator.device())
        dist.all_reduce(moved)
        tensor.copy_(moved)
    return tensor


def gather_objects(value: T) -> list[T]:
    """`value` of every rank, in rank order, on every rank (pickled: small values between trusted ranks only)."""
    if process_group.world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * process_group.world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def from_rank_zero(value: T) -> T:
    """Rank 0's `value`, on every rank."""
    if process_group.world_size() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[no-any-return]


def share(items: Sequence[T]) -> Sequence[T]:
    """This rank's every world_size-th item, so that sorted items spread evenly over the ranks."""
    return items[process_group.rank() :: process_group.world_size()]
