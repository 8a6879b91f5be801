"""Which ranks run on one node, that is, on one machine."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from lander_ds.common import launch
from lander_ds.distributed import collectives, process_group


@dataclass(frozen=True)
class Seat:
    """Where a rank runs, and which part of the model it works on."""

    host: str
    """Name of the machine."""
    local_rank: int
    """Number of the rank there."""
    part: int = 0
    """Pipeline stage."""


def node_group(part: int = 0) -> dist.ProcessGroup:
    """The group of the ranks on this rank's node that work on the same part of the model (collective).

    Args:
        part: pipeline stage of this rank.
    """
    own = Seat(socket.gethostname(), launch.local_rank(), part)
    return process_group.part_of(by_node(collectives.gather_objects(own)))


def by_node(seats: Sequence[Seat]) -> tuple[tuple[int, ...], ...]:
    """The ranks in groups of one node and part.

    Nodes may have different numbers of ranks, in any order. Names of machines need not differ: no node has a local rank
    twice.

    Args:
        seats: of every rank, in rank order.
    """
    nodes: dict[tuple[str, int, int], list[int]] = {}
    for rank, seat in enumerate(seats):
        before = sum((other.host, other.local_rank) == (seat.host, seat.local_rank) for other in seats[:rank])
        nodes.setdefault((seat.host, before, seat.part), []).append(rank)
    return tuple(map(tuple, nodes.values()))
