"""`lander doctor`: the table and the verdict."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from rich.table import Table
from rich.text import Text

from lander_ds.cluster.doctor.doctor import Diagnosis, Options, diagnose
from lander_ds.cluster.doctor.finding import Finding, fails
from lander_ds.common import console
from lander_ds.common.errors import ExitCode

COLOURS = {"ok": "green", "warn": "yellow", "fail": "red", "skipped": "dim"}


def run(arguments: argparse.Namespace) -> None:
    """Ask all hosts, and print what they say; ends the process where one is not ready."""
    if not arguments.timeout > 0:
        arguments.parser.error(f"--timeout must be above 0, found {arguments.timeout}")
    diagnosis = diagnose(
        Options(
            recipe=arguments.recipe,
            overrides=arguments.overrides,
            hostfile=arguments.hostfile,
            ranks=arguments.ranks,
            launcher=arguments.launcher,
            ssh=arguments.ssh,
            ssh_port=arguments.ssh_port,
            python=arguments.python,
            master_addr=arguments.master_addr,
            master_port=arguments.master_port,
            timeout=arguments.timeout,
        )
    )
    if arguments.json:
        console.write_line(json.dumps(as_json(diagnosis), indent=2, ensure_ascii=False))
    else:
        console.stdout.print(table(diagnosis.findings))
        for line in bandwidth_lines(diagnosis):
            console.write_line(line)
        console.write_line(f"verdict: {verdict(diagnosis.findings)}")
    if fails(diagnosis.findings):
        sys.exit(ExitCode.WRONG_INPUT)


def as_json(diagnosis: Diagnosis) -> dict[str, object]:
    """`verdict` (ok or fail), `checks` and `bandwidth`."""
    return {
        "verdict": "fail" if fails(diagnosis.findings) else "ok",
        "checks": [asdict(finding) for finding in diagnosis.findings],
        "bandwidth": diagnosis.bandwidth,
    }


def verdict(findings: Sequence[Finding]) -> str:
    """One line."""
    warned = sum(finding.status == "warn" for finding in findings)
    warnings = f", warnings: {warned}" if warned else ""
    failed = [finding for finding in findings if finding.status == "fail"]
    if not failed:
        return f"ready; checks passed: {sum(finding.status == 'ok' for finding in findings)}{warnings}"
    hosts = ", ".join(dict.fromkeys(finding.host for finding in failed if finding.host))
    checks = ", ".join(dict.fromkeys(finding.check for finding in failed))
    return f"not ready; checks failed: {len(failed)}{warnings} ({checks}{f' on {hosts}' if hosts else ''})"


def table(findings: Sequence[Finding]) -> Table:
    """One row per finding; what is equally well on several hosts shares a row. Faults come last, under everyone's eyes."""
    shown = Table("check", "host", "status", "what was found, and the cure")
    rows: dict[tuple[str, str, str, str], list[str]] = {}
    for finding in findings:
        rows.setdefault((finding.check, finding.status, finding.detail, finding.cure), []).append(
            finding.host
        )
    order = ["ok", "skipped", "warn", "fail"]
    for (check, status, detail, cure), hosts in sorted(rows.items(), key=lambda row: order.index(row[0][1])):
        text = Text(detail)
        if cure:
            text.append(f"\ncure: {cure}", style="bold")
        shown.add_row(check, ", ".join(filter(None, hosts)), Text(status, style=COLOURS[status]), text)
    return shown


def bandwidth_lines(diagnosis: Diagnosis) -> list[str]:
    """What was measured between the ranks."""
    measured = diagnosis.bandwidth
    # One rank adds nothing up.
    if not measured or measured["ranks"] == 1:
        return []
    reduced = measured["all_reduce"]
    lines = [
        f"all-reduce over {measured['ranks']} ranks ({measured['backend']}): {1e6 * reduced['latency_seconds']:.0f} us, "
        f"{reduced['bytes_per_second'] / 1e9:.2f} GB/s per link with {reduced['bytes'] / 1e6:.1f} MB"
    ]
    lines += [
        f"{message['from']} to {message['to']}: {1e6 * message['latency_seconds']:.0f} us, "
        f"{message['bytes_per_second'] / 1e9:.2f} GB/s"
        for message in measured["point_to_point"]
    ]
    return lines
