"""What the hosts found together, held against what the run needs. Pure functions: no host is asked anything here."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lander_ds.cluster.doctor.finding import Finding, Status
from lander_ds.cluster.doctor.hostfile import Host
from lander_ds.config.document import lookup
from lander_ds.config.recipe import Recipe

GIGABYTE = 10**9
CLOCK_WARN_SECONDS, CLOCK_FAIL_SECONDS = 1.0, 10.0
"""Beyond a second no time service is at work. Time stamps on shared directories decide what is compiled again, and
SLURM and Kerberos refuse clocks that are minutes off."""
SLOW_SHARE = 0.5
"""A connection with less than this share of the usual bandwidth is told."""


@dataclass(frozen=True)
class Run:
    """What is about to be started."""

    hosts: Sequence[Host]
    several: bool
    """More than one host."""
    recipe: Recipe | None = None
    """None: it could not be read."""
    deepspeed: Mapping[str, Any] | None = None
    """Content of its DeepSpeed JSON."""

    @property
    def world(self) -> int:
        """Ranks on all hosts."""
        return sum(host.slots for host in self.hosts)

    def offloads(self, what: str) -> bool:
        """Whether the DeepSpeed JSON moves `optimizer` or `param` off the accelerator."""
        return lookup(dict(self.deepspeed or {}), ("zero_optimization", f"offload_{what}", "device")) in (
            "cpu",
            "nvme",
        )


def judge_run(run: Run) -> list[Finding]:
    """Whether the ranks can be divided as the recipe says."""
    if run.recipe is None:
        return []
    stages, world = run.recipe.pipeline_stages, run.world
    if world % stages:
        cure = f"make the slots add up to a multiple of {stages}, or change pipeline_stages"
        return [
            Finding("ranks", "", "fail", f"pipeline_stages: {stages} does not divide {world} ranks", cure)
        ]
    return [
        Finding(
            "ranks", "", "ok", f"{world} ranks: {stages} pipeline stages x {world // stages} data-parallel"
        )
    ]


def judge_clocks(offsets: Mapping[str, tuple[float, float]]) -> list[Finding]:
    """Clocks against each other.

    Args:
        offsets: host -> seconds by which its clock is ahead of this machine's, and how far that may be wrong (half
            a round trip).
    """
    # This machine's own clock counts as well, so that of two hosts the right one can be told.
    middle = statistics.median_low([0.0, *(offset for offset, _ in offsets.values())])
    findings = []
    for host, (offset, error) in offsets.items():
        skew = offset - middle
        detail = f"{abs(skew):.3f} s {'ahead' if skew >= 0 else 'behind'} (+-{error:.3f} s)"
        surely = abs(skew) - error
        if surely > CLOCK_WARN_SECONDS:
            status: Status = "fail" if surely > CLOCK_FAIL_SECONDS else "warn"
            cure = "set the clock with a time service (chrony, systemd-timesyncd)"
            findings.append(Finding("clock", host, status, detail, cure))
        else:
            findings.append(Finding("clock", host, "ok", detail))
    return findings


def judge_bandwidths(messages: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Connections between hosts that are slower than the others.

    Args:
        messages: `from`, `to` (host names), `bytes_per_second`.
    """
    if len(messages) < 3:
        return []
    usual = statistics.median(message["bytes_per_second"] for message in messages)
    return [
        Finding(
            "bandwidth",
            message["from"],
            "warn",
            f"to {message['to']}: {readable(message['bytes_per_second'])}/s, between other hosts {readable(usual)}/s",
            "look at cables, switch ports and the interface that is used",
        )
        for message in messages
        if message["bytes_per_second"] < SLOW_SHARE * usual
    ]


def readable(count: float) -> str:
    """Bytes for people."""
    for unit, factor in (("TB", 10**12), ("GB", GIGABYTE), ("MB", 10**6)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count / 1000:.1f} kB"
