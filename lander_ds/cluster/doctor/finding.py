"""What a check of `lander doctor` found on a host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail", "skipped"]


@dataclass(frozen=True)
class Finding:
    """The result of one check on one host. Warnings do not fail."""

    check: str
    host: str
    """Name in the hostfile; "" for what concerns no single host."""
    status: Status
    detail: str
    cure: str = ""
    """What to do about it; "" where nothing is wrong."""


def fails(findings: Sequence[Finding]) -> bool:
    """Whether something has to be cured before a run can start."""
    return any(finding.status == "fail" for finding in findings)
