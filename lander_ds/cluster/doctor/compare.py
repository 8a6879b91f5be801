"""What differs between hosts, told by host and with the names of what differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lander_ds.cluster.doctor.finding import Finding, Status
from lander_ds.common.run_directory import RECORDED_PACKAGES
from lander_ds.distributed.agreement import ABSENT, CURES, reference
from lander_ds.preflight.facts import MISSING

Looks = Mapping[str, Mapping[str, Any]]
"""Host -> what `inspection.inspect` found there."""

SHOWN = 5
"""Differences that a detail names."""

CHECKS = {
    "recipe": "recipe",
    "deepspeed": "deepspeed_json",
    "base": "model",
    "run_dir": "data",
    "code": "code",
}
"""Kinds of `agreement.collect` -> names of checks. Packages and devices are compared on their own, because a host
without a sound recipe has some too."""

UNREADABLE: dict[str, Status] = {"base": "fail", "run_dir": "warn"}
"""What it means when a host cannot read its files of a kind. Those of stages can be made again."""


@dataclass(frozen=True)
class Difference:
    """A value that some hosts have and others do not."""

    name: str
    value: str
    host: str
    common: str
    """The value that is held to be right: the most frequent one, in a tie that of the first host."""
    holder: str
    """A host that has it."""

    def __str__(self) -> str:
        return f"{self.name} is {self.value}, on {self.holder} {self.common}"


def differences(values: Mapping[str, Mapping[str, str]]) -> Iterator[Difference]:
    """Names whose value is not the same on all hosts.

    Args:
        values: host -> name -> value.
    """
    for name in dict.fromkeys(name for own in values.values() for name in own):
        of_host = {host: own.get(name, ABSENT) for host, own in values.items()}
        common, _ = reference(list(of_host.values()))
        holder = next(host for host, value in of_host.items() if value == common)
        for host, value in of_host.items():
            if value != common:
                yield Difference(name, value, host, common, holder)


def compare_hosts(looks: Looks) -> list[Finding]:
    """Software, devices, recipe, model and data of all hosts against each other."""
    findings = [*_compare_packages(looks), *_compare_devices(looks)]
    facts = {
        host: look["recipe"]["facts"] for host, look in looks.items() if "facts" in look.get("recipe", {})
    }
    for kind, check in CHECKS.items() if facts else ():
        values = {host: own.get(kind, {}) for host, own in facts.items()}
        findings += _findings(check, values, CURES[kind], "fail")
        findings += _unreadable(check, values, UNREADABLE.get(kind))
    return findings


def _unreadable(
    check: str, values: Mapping[str, Mapping[str, str]], status: Status | None
) -> Iterator[Finding]:
    for host, own in values.items():
        for name, value in own.items():
            if status is not None and value.startswith("unreadable"):
                yield Finding(check, host, status, f"{name} is {value}", "see there")


def _compare_packages(looks: Looks) -> list[Finding]:
    installed = {host: look["packages"] for host, look in looks.items() if "error" not in look["packages"]}
    python = {host: {"Python": look["machine"].get("python", ABSENT)} for host, look in looks.items()}
    recorded = {
        host: {name: own.get(name, ABSENT) for name in RECORDED_PACKAGES} for host, own in installed.items()
    }
    rest = {
        host: {name: version for name, version in own.items() if name not in RECORDED_PACKAGES}
        for host, own in installed.items()
    }
    cure = CURES["package"]
    return [
        *_findings("python", python, "install the same Python on all hosts", "fail"),
        *_findings("packages", recorded, cure, "fail"),
        *_findings("other_packages", rest, cure, "warn"),
    ]


def _compare_devices(looks: Looks) -> list[Finding]:
    values = {}
    for host, look in looks.items():
        own, architecture = look["accelerator"], look["machine"].get("architecture", ABSENT)
        if "error" not in own:
            kinds = ", ".join(dict.fromkeys(card["name"] for card in own["cards"])) or "CPU"
            versions = {"CUDA": own["cuda"], "NCCL": own["nccl"]} if own["cards"] else {}
            values[host] = {"device": kinds, "architecture": architecture, **versions}
    return _findings("device", values, CURES["device"], "fail")


def _findings(
    check: str, values: Mapping[str, Mapping[str, str]], cure: str, status: Status
) -> list[Finding]:
    """One finding per host that differs; if none does, they all say what they have in common."""
    by_host: dict[str, list[Difference]] = {}
    for difference in differences(values):
        by_host.setdefault(difference.host, []).append(difference)
    if not by_host:
        return [Finding(check, host, "ok", _summary(own, len(values))) for host, own in values.items()]
    return [Finding(check, host, status, _listed(own), cure) for host, own in by_host.items()]


def _summary(shown: Mapping[str, str], hosts: int) -> str:
    if len(shown) > len(RECORDED_PACKAGES):
        return f"{len(shown)} values{', the same on all hosts' if hosts > 1 else ''}"
    return ", ".join(
        f"{name} {'not there yet' if value == MISSING else value}" for name, value in shown.items()
    )


def _listed(shown: Sequence[Difference]) -> str:
    more = f"; and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return "; ".join(map(str, shown[:SHOWN])) + more
