"""Whether all ranks were started alike, settled before there is a process group that could hang.

Every rank collects facts: recipe, DeepSpeed JSON, package versions, source code, device, and the files of the run
that it sees. Rank 0 compares them over the key-value store at MASTER_ADDR:MASTER_PORT, where the process group
meets afterwards. Ranks that differ or never arrive are named on every rank.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import groupby

from torch.distributed import DistError, Store, TCPStore  # type: ignore[attr-defined]

from lander_ds.common.errors import ConfigError
from lander_ds.distributed import discovery

logger = logging.getLogger(__name__)

Facts = Mapping[str, Mapping[str, str]]
"""Kind (a key of `CURES`) -> what -> value."""

ARRIVAL_SECONDS = 600.0
"""How long ranks wait for one another: slow file systems and containers make a start take minutes."""

NOTICE_SECONDS = 20.0
"""After this long rank 0 says for whom it waits."""

ANSWER_SECONDS = 30.0
"""How long the comparison itself may take."""

SHOWN = 20
"""Differences that a message lists."""

ABSENT = "absent"

CURES = {
    "command": "start all ranks with one command",
    "recipe": "give all ranks the same recipe and the same --set; keep the recipe in a directory that all hosts share",
    "deepspeed": "give all ranks the same DeepSpeed JSON; keep it in a directory that all hosts share",
    "device": "use hosts of one kind; where a GPU is not seen, check its driver, CUDA_VISIBLE_DEVICES and PyTorch",
    "package": "install the same requirements.txt on all hosts",
    "base": "copy the model directory again from a host that has the right one",
    "run_dir": "is run_dir, and data.cache_dir, a directory that all hosts share? A relative one counts from the "
    "directory that a rank is started in. Run the earlier stages there once",
    "code": "install the same version of lander_ds on all hosts",
}
"""What to do, per kind of fact, in the order in which differences are listed."""


@dataclass(frozen=True)
class Report:
    """What one rank found."""

    host: str
    facts: Facts


@contextmanager
def alike(facts: Facts, ranks: int) -> Iterator[None]:
    """Inside, all ranks are there and were started alike; the process group is to be started inside.

    Rank 0's store stays open inside, so that PyTorch takes it over. Does nothing with one rank.

    Args:
        facts: of this rank.
        ranks: how many processes were started.

    Raises:
        ConfigError: on every rank the same: ranks differ, or did not arrive.
    """
    if ranks == 1:
        yield
        return
    discovery.discover()
    rank = int(os.environ["RANK"])
    store = _open_store(rank, ranks, ARRIVAL_SECONDS)
    refusal = exchange(store, rank, ranks, Report(socket.gethostname(), facts), ARRIVAL_SECONDS)
    if refusal:
        raise ConfigError(refusal)
    yield


def exchange(store: Store, rank: int, ranks: int, report: Report, seconds: float) -> str:
    """Tell rank 0 the report and hear from it what is wrong, the same text on every rank; "" is nothing.

    Args:
        store: shared by all ranks.
        rank: this process.
        ranks: how many there are.
        report: what this rank found.
        seconds: how long rank 0 waits for the others.
    """
    try:
        return _judge(store, ranks, report, seconds) if rank == 0 else _ask(store, rank, report, seconds)
    except DistError as error:
        raise ConfigError(f"lost rank 0 before the start, its own message says why ({error})") from None


def compare(reports: Sequence[Report]) -> str:
    """What is not alike, with the ranks (places in `reports`) that are to blame, and the cures; "" if nothing.

    A rank is to blame that differs from the most common value, and in a tie from rank 0.
    """
    lines: list[str] = []
    kinds: list[str] = []
    deviating: set[int] = set()
    for kind, name in _names(reports):
        values = [report.facts.get(kind, {}).get(name, ABSENT) for report in reports]
        common, by_majority = reference(values)
        holder = "on most ranks" if by_majority else "on rank 0"
        for value in dict.fromkeys(values):
            if value == common:
                continue
            wrong = [rank for rank, own in enumerate(values) if own == value]
            deviating.update(wrong)
            kinds.append(kind)
            lines.append(f"  {_who(wrong, reports)}: {kind} {name} is {value}, {holder} {common}")
    if not lines:
        return ""
    if len(lines) > SHOWN:
        lines[SHOWN:] = [f"  ... and {len(lines) - SHOWN} more"]
    who = _who(sorted(deviating), reports)
    cures = [f"{kind}: {CURES[kind]}" for kind in dict.fromkeys(kinds)]
    return "\n".join(
        [f"nothing was started, because not all ranks are alike; look at {who}:", *lines, *cures]
    )


def _names(reports: Sequence[Report]) -> Iterator[tuple[str, str]]:
    """Every (kind, name) that some rank knows."""
    for kind in CURES:
        names = dict.fromkeys(name for report in reports for name in report.facts.get(kind, {}))
        yield from ((kind, name) for name in names)


def reference(values: Sequence[str]) -> tuple[str, bool]:
    """The value that is held to be right: the most frequent one (True), in a tie the first (False)."""
    (first, most), *others = Counter(values).most_common()
    if others and others[0][1] == most:
        return values[0], False
    return first, True


def _who(ranks: Sequence[int], reports: Sequence[Report]) -> str:
    """`ranks 1-3, 7 (node-b, node-c)`."""
    hosts = dict.fromkeys(reports[rank].host for rank in ranks)
    return f"{_listed(ranks)} ({', '.join(hosts)})"


def _listed(ranks: Sequence[int]) -> str:
    """`rank 4`, or `ranks 1-3, 7`; `ranks` ascend."""
    # Inside a gapless stretch, rank and place grow alike.
    stretches = [
        [rank for _, rank in group] for _, group in groupby(enumerate(ranks), lambda pair: pair[1] - pair[0])
    ]
    texts = [str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in stretches]
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(texts)}"


def _open_store(rank: int, ranks: int, seconds: float) -> Store:
    """The store on rank 0's host.

    Raises:
        ConfigError: the port is taken, or rank 0 did not arrive.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torchrun's agent keeps the store itself.
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not serves:
        _wait_for_port(address, port, seconds)
    try:
        return TCPStore(
            address,
            port,
            ranks,
            is_master=serves,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except DistError as error:
        raise ConfigError(
            f"rank {rank} cannot use port {port} of {address} ({error}): end the other run that uses it, or "
            "pass another --master_port to the launcher"
        ) from None


def _wait_for_port(address: str, port: int, seconds: float) -> None:
    """TCPStore could wait by itself, but it logs every attempt and cannot be interrupted."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((address, port), timeout=5.0).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"rank 0 did not open {address}:{port} within {seconds:g} seconds ({error}): its own message "
                    "may say why; check that this host reaches that address"
                ) from None
        time.sleep(0.1)


def _judge(store: Store, ranks: int, report: Report, seconds: float) -> str:
    """Rank 0's part: wait for all reports, compare them, publish the result."""
    others = range(1, ranks)
    missing = _wait_for(store, "report", others, min(seconds, NOTICE_SECONDS))
    if missing:
        logger.info("waiting for %s of %d", _listed(missing), ranks)
        missing = _wait_for(store, "report", missing, seconds - NOTICE_SECONDS)
    if missing:
        refusal = (
            f"{_listed(missing)} of {ranks} did not arrive within {seconds:g} seconds: their own messages may say "
            f"why; check that all hosts were started and reach {os.environ.get('MASTER_ADDR', 'rank 0')}"
        )
    else:
        received = (json.loads(store.get(f"lander/report/{other}")) for other in others)
        refusal = compare([report, *(Report(**content) for content in received)])
    store.set("lander/refusal/0", refusal)
    # The store may go when this function returns, so all must have read it.
    _wait_for(store, "done", sorted(set(others) - set(missing)), ANSWER_SECONDS)
    return refusal


def _ask(store: Store, rank: int, report: Report, seconds: float) -> str:
    """The part of the other ranks: report, and wait for the result."""
    store.set(f"lander/report/{rank}", json.dumps(asdict(report)))
    # Rank 0 arrived before this rank could reach it, so its own wait ends first.
    if _wait_for(store, "refusal", [0], seconds + ANSWER_SECONDS):
        raise ConfigError("rank 0 did not answer: its own message may say why")
    refusal = store.get("lander/refusal/0").decode()
    store.set(f"lander/done/{rank}", "")
    return refusal


def _wait_for(store: Store, what: str, ranks: Sequence[int], seconds: float) -> list[int]:
    """The ranks that have not set `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        # Polled, because a blocking wait names nobody and cannot be interrupted.
        ranks = [rank for rank in ranks if not store.check([f"lander/{what}/{rank}"])]
        if not ranks or time.monotonic() > deadline:
            return ranks
        time.sleep(0.05)
