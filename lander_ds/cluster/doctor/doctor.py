"""`lander doctor`: asks all hosts of a run, before any GPU time, whether it will start, and measures the network.

Every host has a probe (`probe.py`), reached over ssh as DeepSpeed's launcher reaches it: same interpreter, same
directory, same environment. A host that does not answer is told and left out of what follows.
"""

from __future__ import annotations

import logging
import os
import secrets
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from lander_ds.cluster.doctor.compare import compare_hosts
from lander_ds.cluster.doctor.environment import travelling
from lander_ds.cluster.doctor.finding import Finding
from lander_ds.cluster.doctor.fleet import Fleet
from lander_ds.cluster.doctor.hostfile import Host, read_hostfile
from lander_ds.cluster.doctor.judge import Run, judge_clocks, judge_run
from lander_ds.cluster.doctor.judge_host import judge_hosts
from lander_ds.cluster.doctor.network import (
    Rendezvous,
    communicate,
    ranks_on,
    rendezvous,
    slow_connections,
    try_pdsh,
)
from lander_ds.cluster.doctor.remote import Access, Answer, Connection, HostLost, Reply, timed
from lander_ds.common.errors import LanderError
from lander_ds.config.deepspeed_json import load_deepspeed_json
from lander_ds.config.loading import load_recipe
from lander_ds.config.recipe import Recipe
from lander_ds.distributed.agreement import CURES

logger = logging.getLogger(__name__)

CLOCK_ROUNDS = 5
LOCAL = "localhost"
"""This machine, without a hostfile."""
_WRITABLE = "give this user the right to write there; name a directory on a file system that all hosts share"


@dataclass(frozen=True)
class Options:
    """What `lander doctor` is told."""

    recipe: Path
    overrides: Sequence[str] = ()
    hostfile: Path | None = None
    """None: this machine alone, without ssh."""
    ranks: int | None = None
    """Without a hostfile: ranks on this machine. Default: one per GPU; 2 without GPUs."""
    launcher: Literal["pdsh", "ssh"] = "pdsh"
    """`pdsh`: DeepSpeed's default, with its rules of what environment travels. `ssh`: anything else."""
    ssh: str = "ssh"
    """ssh with options, as in a shell."""
    ssh_port: int | None = None
    python: str | None = None
    """Interpreter on the hosts; default: the path of this one, as DeepSpeed's launcher takes it."""
    master_addr: str | None = None
    """Where the ranks meet; default: as DeepSpeed, the first address of the first host."""
    master_port: int = 29500
    timeout: float = 120.0
    """Seconds that one question to a host may take."""


@dataclass
class Diagnosis:
    """Everything that was found."""

    findings: list[Finding] = field(default_factory=list)
    bandwidth: dict[str, Any] = field(default_factory=dict)
    """`backend`, `ranks`, `all_reduce`, `point_to_point`; empty where nothing could be measured."""


def diagnose(options: Options) -> Diagnosis:
    """Run every check."""
    diagnosis = Diagnosis()
    findings = diagnosis.findings
    # First, because DeepSpeed adds variables when it is imported.
    access = _access(options, findings)
    recipe, deepspeed = _read(options, findings)
    hosts = _hosts(options, findings)
    if not hosts:
        findings.append(Finding("hosts", "", "skipped", "nobody to ask", "correct the hostfile first"))
        return diagnosis
    run = Run(hosts, options.hostfile is not None and len(hosts) > 1, recipe, deepspeed)
    findings += judge_run(run)
    with Fleet(findings) as fleet:
        logger.info("asking %d hosts", len(hosts))
        for host, answer in fleet.meet([host.name for host in hosts], access).items():
            fleet.add(
                "ssh",
                host,
                "ok",
                f"answers as {answer['hostname']}" if access.ssh else "this machine, without ssh",
            )
        if access.ssh:
            findings += judge_clocks(_clocks(fleet))
        looks = _look(fleet, options, run)
        findings += compare_hosts(looks)
        findings += judge_hosts(run, looks)
        if recipe is not None:
            _share(fleet, "run_dir", recipe.run_dir)
            if recipe.data.cache_dir is not None:
                _share(fleet, "data.cache_dir", recipe.data.cache_dir)
        if options.launcher == "pdsh" and run.several and fleet.names:
            try_pdsh(fleet, options.ssh_port, options.timeout)
        diagnosis.bandwidth = _measure(fleet, options, run, looks)
        findings += slow_connections(diagnosis.bandwidth)
    return diagnosis


def _read(options: Options, findings: list[Finding]) -> tuple[Recipe | None, dict[str, Any] | None]:
    """The recipe and its DeepSpeed JSON as they are here; whether they pass their checks is looked at on the hosts."""
    try:
        recipe = load_recipe(options.recipe, options.overrides)
    except LanderError as error:
        findings.append(
            Finding("recipe", "", "fail", str(error), "correct it; what depends on it was left out")
        )
        return None, None
    try:
        return recipe, load_deepspeed_json(Path(recipe.deepspeed))
    except LanderError as error:
        findings.append(Finding("deepspeed_json", "", "fail", str(error), "correct it"))
        return recipe, None


def _hosts(options: Options, findings: list[Finding]) -> list[Host]:
    if options.hostfile is not None:
        hosts, complaints = read_hostfile(options.hostfile)
        findings += complaints
        return hosts
    ranks = options.ranks
    if ranks is None:
        ranks = torch.cuda.device_count() or 2
    return [Host(LOCAL, ranks)]


def _access(options: Options, findings: list[Finding]) -> Access:
    """How the hosts are reached, and with which environment."""
    here = (options.python or sys.executable, os.getcwd())
    if options.hostfile is None:
        return Access(*here, ssh=None, seconds=options.timeout)
    variables: dict[str, str] = {}
    if options.launcher == "pdsh":
        passed = travelling(os.environ, Path.cwd())
        findings += passed.findings
        variables = passed.variables
    return Access(*here, tuple(shlex.split(options.ssh)), options.ssh_port, variables, options.timeout)


def _clocks(fleet: Fleet) -> dict[str, tuple[float, float]]:
    """Host -> by how many seconds its clock is ahead of this machine's, and how far that may be wrong."""

    def offset(_: str, connection: Connection) -> tuple[float, float]:
        replies = [timed(connection, "clock") for _ in range(CLOCK_ROUNDS)]
        best = min(replies, key=_round_trip)
        return best.answer["time"] - (best.sent + best.received) / 2, _round_trip(best) / 2

    return fleet.each(offset)


def _round_trip(reply: Reply) -> float:
    return reply.received - reply.sent


def _look(fleet: Fleet, options: Options, run: Run) -> dict[str, Answer]:
    """What every host sees of itself."""
    logger.info("looking at software, recipe, model, data, memory and disks of %d hosts", len(fleet.names))
    counting = fleet.names[:1]

    def look(host: str, connection: Connection) -> Answer:
        return connection.ask(
            "look",
            recipe=None if run.recipe is None else str(options.recipe),
            overrides=list(options.overrides),
            ranks=[each.slots for each in run.hosts] if host in counting else None,
            address=options.master_addr,
        )

    answers = fleet.each(look)
    for host in [host for host, answer in answers.items() if "machine" not in answer]:
        # A probe whose own code is broken answers with an error alone.
        error = str(answers.pop(host)["error"])
        fleet.lose(host, HostLost("probe", error, "install the same lander_ds and requirements there"))
    return answers


def _share(fleet: Fleet, key: str, directory: str) -> None:
    """Whether a directory is one and the same everywhere, and can be written: what one host leaves the others find."""
    if not fleet.names:
        return
    writer, token = fleet.names[0], secrets.token_hex(8)
    put = fleet.ask("put_token", [writer], directory=directory, token=token)
    if writer not in put:
        return
    there = put[writer]["path"]
    if error := put[writer]["error"]:
        fleet.add(key, writer, "fail", f"{there} cannot be written ({error})", _WRITABLE)
        return
    fleet.add(key, writer, "ok", f"{there} can be written")
    for host, answer in fleet.ask("find_token", fleet.names[1:], directory=directory, token=token).items():
        if not answer["seen"]:
            detail = f"{answer['path']} is another directory than {there} on {writer}"
            fleet.add(key, host, "fail", detail, CURES["run_dir"])
        elif answer["error"]:
            fleet.add(key, host, "fail", f"{answer['path']} cannot be written ({answer['error']})", _WRITABLE)
        else:
            fleet.add(key, host, "ok", f"{answer['path']} can be written, and is the same as on {writer}")
    fleet.ask("remove_tokens", [writer])


def _measure(fleet: Fleet, options: Options, run: Run, looks: dict[str, Answer]) -> dict[str, Any]:
    """The communication test, where the ranks can meet."""
    slots = {host.name: host.slots for host in run.hosts}
    present = [host for host in fleet.names if host in looks]
    if not present:
        return {}
    first = present[0]
    address = options.master_addr or ("127.0.0.1" if options.hostfile is None else None)
    address = address or next(iter(looks[first]["network"].get("addresses") or ()), None)
    if address is None:
        cure = "install hostname there (Debian: hostname), or pass --master_addr to deepspeed and --master-addr here"
        fleet.add(
            "rendezvous", first, "fail", "`hostname -I`, which DeepSpeed asks for the address, fails", cure
        )
        return {}
    point = Rendezvous(first, address, options.master_port)
    if not rendezvous(fleet, point):
        fleet.add("collective", "", "skipped", "the ranks cannot meet", "see rendezvous")
        return {}
    counts = {host: ranks_on(slots[host], looks[host], run.several) for host in fleet.names if host in looks}
    logger.info("communication test with %d ranks", sum(counts.values()))
    return communicate(fleet, counts, point, options.timeout)
