"""The hostfile, read as DeepSpeed's launcher reads it: `NAME slots=N` per line, `#` lines and blank lines aside.

DeepSpeed goes on with this machine alone when the file is missing, and says neither line nor cure when it is wrong.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from lander_ds.cluster.doctor.finding import Finding

CHECK = "hostfile"
_LINE = re.compile(r"(\S+)\s+slots=(\d+)(.*)")
_EXAMPLE = "write a line per host, for example: node1 slots=8"


@dataclass(frozen=True)
class Host:
    """A host of the run."""

    name: str
    """As ssh knows it."""
    slots: int
    """Ranks to be started there."""


def read_hostfile(path: Path) -> tuple[list[Host], list[Finding]]:
    """The hosts whose lines are sound, in order, and what is wrong with the file.

    Args:
        path: the hostfile.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        cure = f"create it: {_EXAMPLE}"
        return [], [
            _fail(f"{path} does not exist; DeepSpeed would only warn and use this machine alone", cure)
        ]
    except (OSError, UnicodeDecodeError) as error:
        return [], [_fail(f"{path} cannot be read ({error})", "name a text file that you may read")]
    hosts: dict[str, Host] = {}
    lines: dict[str, int] = {}
    findings: list[Finding] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.strip().startswith("#"):
            continue
        host, finding = _parse(f"{path}, line {number}", line.strip())
        if host is not None and host.name in hosts:
            what = f"{path}, line {number}: {host.name} stands in line {lines[host.name]} already"
            findings.append(_fail(what, "give each host one line, with all its slots", host.name))
        elif host is not None:
            hosts[host.name], lines[host.name] = host, number
        if finding is not None:
            findings.append(finding)
    if not hosts and not findings:
        findings.append(_fail(f"{path} names no host", _EXAMPLE))
    if not any(finding.status == "fail" for finding in findings):
        ranks = sum(host.slots for host in hosts.values())
        findings.append(Finding(CHECK, "", "ok", f"{path}: {len(hosts)} hosts, {ranks} ranks"))
    return list(hosts.values()), findings


def _parse(where: str, line: str) -> tuple[Host | None, Finding | None]:
    name = line.split(maxsplit=1)[0]
    match = _LINE.fullmatch(line)
    if match is None:
        what = "has no slots=N" if "slots" not in line else "is not NAME slots=N"
        return None, _fail(f"{where}: {line!r} {what}", _EXAMPLE, name)
    if int(match[2]) == 0:
        return None, _fail(
            f"{where}: {name} has 0 slots", "write how many ranks it runs, or remove the line", name
        )
    host, rest = Host(name, int(match[2])), match[3].strip()
    if rest and not rest.startswith("#"):
        what = f"{where}: {rest!r} after slots={host.slots} is not read"
        return host, Finding(CHECK, name, "warn", what, "remove it, or put a # before it")
    return host, None


def _fail(detail: str, cure: str, host: str = "") -> Finding:
    return Finding(CHECK, host, "fail", detail, cure)
