"""Which ranks run on one node, that is, on one machine."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from lander_ds.distributed import collectives, process_group

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def node_group(part: int = 0) -> dist.ProcessGroup:
    """The group of the ranks on this rank's node that work on the same part of the model (collective).

    Args:
        part: pipeline stage of this rank.
    """
    return process_group.part_of(by_node(collectives.gather_objects((this_node(), part))))


def this_node() -> str:
    """What this machine's processes have in common, and those of no other machine: names of machines need not differ.

    Local ranks would not do: where a launcher shows each rank its own device alone, all of them are 0.
    """
    return f"{socket.gethostname()} {_BOOT_ID.read_text() if _BOOT_ID.exists() else ''}"


def by_node(parts: Sequence[tuple[str, int]]) -> tuple[tuple[int, ...], ...]:
    """The ranks in groups of one node and part. Nodes may have different numbers of ranks, in any order.

    Args:
        parts: node and part of every rank, in rank order.
    """
    groups: dict[tuple[str, int], list[int]] = {}
    for rank, part in enumerate(parts):
        groups.setdefault(part, []).append(rank)
    return tuple(map(tuple, groups.values()))
