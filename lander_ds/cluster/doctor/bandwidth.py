"""One rank of the communication test: an all-reduce over all ranks, and messages between any two hosts, timed.

Started by `ranks.Ranks` with the variables that a launcher sets. Prints what it is doing, and last its result.
Sizes grow until one operation takes a noticeable time, so slow networks need no more patience than fast ones.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

from lander_ds.cluster.doctor.remote import MARK

SMALLEST, LARGEST, GROWTH = 1 << 16, 1 << 26, 4
"""Bytes of a message, and by how much the next one is larger."""
ENOUGH_SECONDS = 0.3
"""Once an operation takes so long, its message is large enough."""
WARM_UP, REPEATS = 3, 20


def main() -> None:
    """Measure and print."""
    threading.Thread(target=_leave_with_the_parent, daemon=True).start()
    leaders, limit = json.loads(sys.argv[1]), float(sys.argv[2])
    try:
        result = _measure(leaders, limit)
    except Exception as error:
        # Of any kind; whoever started this rank names it.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        _tell({**_doing, "error": lines[0][:300]})
        sys.stdout.flush()
        os._exit(1)
    _tell(result)
    # Without an orderly end of the process group, which could wait for ranks that have failed.
    os._exit(0)


_doing: dict[str, Any] = {}


def _tell(what: dict[str, Any]) -> None:
    sys.stdout.write(f"{MARK}{json.dumps(what)}\n")
    sys.stdout.flush()


def _begin(doing: str) -> None:
    _doing["doing"] = doing
    _tell(_doing)


def _leave_with_the_parent() -> None:
    # os.read, because sys.stdin has a lock that would stand in the way of an end of the main thread.
    while os.read(0, 1):
        pass
    os._exit(1)


def _measure(leaders: Sequence[int], limit: float) -> dict[str, Any]:
    _begin("importing PyTorch")
    import torch  # noqa: PLC0415
    import torch.distributed as dist  # noqa: PLC0415

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if cuda:
        # A launcher may show each rank its own device alone.
        number = 0 if torch.cuda.device_count() == 1 else int(os.environ["LOCAL_RANK"])
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    _begin(f"meeting at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}")
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=max(5.0, 0.8 * limit)))
    _begin("all-reduce over all ranks")
    tool = _Stopwatch(device)
    reduced = tool.all_reduce(rank, world)
    messages = []
    for turn in _tournament(leaders):
        for pair in turn:
            if rank in pair:
                other = pair[0] if rank == pair[1] else pair[1]
                _begin(f"messages to and from rank {other}")
                measured = tool.messages(other, first=rank == pair[0])
                if rank == pair[0]:
                    messages.append({"from": rank, "to": other, **measured})
    _begin("waiting for the other ranks to finish")
    dist.barrier()
    return {"backend": dist.get_backend(), "all_reduce": reduced, "messages": messages}


def _tournament(players: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Every pair once, in turns in which nobody has two partners (circle method)."""
    circle: list[int | None] = list(players) + [None] * (len(players) % 2)
    turns = []
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        opposite = zip(circle[:half], reversed(circle[half:]), strict=True)
        turns.append([(min(a, b), max(a, b)) for a, b in opposite if a is not None and b is not None])
        circle[1:] = [circle[-1], *circle[1:-1]]
    return turns


class _Stopwatch:
    """Times operations on one device."""

    def __init__(self, device: Any) -> None:
        import torch  # noqa: PLC0415
        import torch.distributed as dist  # noqa: PLC0415

        self._torch, self._dist, self._device = torch, dist, device

    def all_reduce(self, rank: int, world: int) -> dict[str, Any]:
        """Latency of the smallest and bandwidth of a large all-reduce; the same on every rank.

        Raises:
            ValueError: the sum is wrong.
        """
        torch, dist = self._torch, self._dist
        one = torch.full((1,), float(rank + 1), device=self._device)
        dist.all_reduce(one)
        if one.item() != world * (world + 1) / 2:
            raise ValueError(
                f"the sum over {world} ranks came out as {one.item():g}, not {world * (world + 1) / 2:g}"
            )
        latency = self._median(lambda: dist.all_reduce(one))
        size = SMALLEST
        while True:
            block = torch.ones(size // 4, device=self._device)
            dist.all_reduce(block)
            took = torch.tensor([self._once(partial(dist.all_reduce, block))], device=self._device)
            dist.all_reduce(took, op=dist.ReduceOp.MAX)
            seconds = float(took.item())
            if seconds >= ENOUGH_SECONDS or size >= LARGEST:
                break
            size *= GROWTH
        # What every link carries in a ring, as in NVIDIA's nccl-tests ("busbw").
        return {
            "bytes": size,
            "seconds": seconds,
            "latency_seconds": latency,
            "bytes_per_second": 2 * (world - 1) / world * size / seconds,
        }

    def messages(self, other: int, first: bool) -> dict[str, float]:
        """Latency and bandwidth to `other`, which calls this too; figures are those of the `first`."""
        torch, dist = self._torch, self._dist
        small = torch.zeros(1, device=self._device)

        def ping() -> None:
            for step in (dist.send, dist.recv) if first else (dist.recv, dist.send):
                step(small, other)

        latency = self._median(ping) / 2
        size, seconds = SMALLEST, 0.0
        while True:
            block = torch.ones(size // 4, device=self._device)

            def carry(block: Any = block) -> None:
                if first:
                    dist.send(block, other)
                    dist.recv(small, other)
                else:
                    dist.recv(block, other)
                    dist.send(small, other)

            carry()
            seconds = self._once(carry)
            go_on = torch.tensor([float(seconds < ENOUGH_SECONDS and size < LARGEST)], device=self._device)
            (dist.send if first else dist.recv)(go_on, other)
            if not go_on.item():
                break
            size *= GROWTH
        return {"bytes": size, "latency_seconds": latency, "bytes_per_second": size / seconds}

    def _once(self, operation: Callable[[], object]) -> float:
        self._settle()
        began = time.perf_counter()
        operation()
        self._settle()
        return time.perf_counter() - began

    def _median(self, operation: Callable[[], object]) -> float:
        for _ in range(WARM_UP):
            operation()
        return sorted(self._once(operation) for _ in range(REPEATS))[REPEATS // 2]

    def _settle(self) -> None:
        if self._device.type == "cuda":
            self._torch.cuda.synchronize()


if __name__ == "__main__":
    main()
