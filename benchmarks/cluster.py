#!/usr/bin/env python
"""Do launches on several hosts train what one host trains, and what is left when something breaks?

Hosts are made on this machine (lab.py), which needs root. One training, of a small random model on real sentences or
with --demo of the demonstration's, runs on one host, then with each launcher over several; every loss is compared.
Then a launch is hurt in the middle: it must end with an exit code other than 0 in the set time and leave no process
on any host, and the same command must go on to the same losses. docs/cluster.md says how to read the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import Lab, missing
from launches import LEASE_SECONDS, Failed, Job, Launch, demo_job, idle, laboratory, left, tiny_job

LAUNCHERS = ("pdsh", "openmpi", "mpirun", "slurm")
TOLERANCE = 1e-5
"""Largest relative difference of a step's loss."""
STALL_SECONDS = 40.0
"""train.stall_seconds, where it counts: when the watchdog ends a training in which nothing happens."""
SET_SECONDS = {"lease": LEASE_SECONDS + 30.0, "stall": STALL_SECONDS + 45.0, "at once": 45.0}
"""How long a launcher may take to end after a fault that it notices so. Watchdogs wait for one another, launchers for
their processes, guards for what they end; the machine's two cores do all of it."""


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong in the middle of a training."""

    name: str
    launcher: str
    noticed: str
    """How: a key of SET_SECONDS."""
    strike: Callable[[Launch, str], object]
    """Does it; the second argument is the last host."""
    mend: Callable[[Lab, str], object] = lambda lab, host: None
    """Repairs the host."""

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.launcher}: {self.name}"

    @property
    def overrides(self) -> list[str]:
        """Of the recipe."""
        return [f"train.stall_seconds={STALL_SECONDS}"] if self.noticed == "stall" else []


def _kill_pdsh(launch: Launch, host: str) -> None:
    for process in launch.process().children(recursive=True):
        # Debian calls it pdsh.bin.
        if process.name().startswith("pdsh"):
            process.kill()


FAULTS = (
    Fault("rank killed", "pdsh", "at once", lambda launch, host: launch.rank_on(host).kill()),
    Fault("link cut", "pdsh", "lease", lambda launch, host: launch.lab.cut(host), Lab.mend),
    Fault("sshd stopped", "pdsh", "at once", lambda launch, host: launch.lab.stop_sshd(host), Lab.start_sshd),
    Fault("Ctrl-C", "pdsh", "at once", lambda launch, host: launch.process().send_signal(signal.SIGINT)),
    Fault("pdsh killed", "pdsh", "at once", _kill_pdsh),
    Fault("link cut", "openmpi", "lease", lambda launch, host: launch.lab.cut(host), Lab.mend),
    Fault("rank stopped", "mpirun", "stall", lambda launch, host: launch.rank_on(host).suspend()),
    Fault("SIGTERM", "mpirun", "at once", lambda launch, host: launch.process().terminate()),
    Fault("launcher killed", "mpirun", "at once", lambda launch, host: launch.process().kill()),
    Fault("rank killed", "slurm", "at once", lambda launch, host: launch.rank_on(host).kill()),
)


REQUEUE = "slurm: requeue"


def measure_launcher(lab: Lab, job: Job, launcher: str, reference: str) -> dict[str, Any]:
    """Train with a launcher, and compare with the reference."""
    job.copy(launcher)
    begun = time.monotonic()
    launch = Launch(lab, job, launcher, launcher)
    code = launch.wait()
    if code:
        say(launch.tail())
    return {
        "hosts": job.ranks,
        "max_rel_loss_diff": job.difference(launcher, reference),
        "exit_code": code,
        "seconds": round(time.monotonic() - begun, 1),
    }


def measure_fault(lab: Lab, job: Job, fault: Fault, reference: str) -> dict[str, Any]:
    """Hurt a training in the middle; afterwards have the same command go on."""
    name, host = f"{fault.launcher} {fault.name}".replace(" ", "-"), lab.hosts[-1]
    job.copy(name)
    before = idle(lab)
    command = (fault.launcher, name, ["--max-restarts", "0"], fault.overrides)
    launch = Launch(lab, job, *command)
    launch.wait_for_step(6)
    fault.strike(launch, host)
    struck = time.monotonic()
    try:
        code = launch.wait(SET_SECONDS[fault.noticed] + 60.0)
        seconds = time.monotonic() - struck
        # What a host that is cut off has to end by itself.
        while (remaining := left(lab, before)) and time.monotonic() - struck < SET_SECONDS[fault.noticed]:
            time.sleep(0.2)
        clean = time.monotonic() - struck
    finally:
        fault.mend(lab, host)
    if remaining:
        say("\n".join(["left:", *remaining, launch.tail()]))
    done = len(job.losses(name))
    again = Launch(lab, job, *command)
    resumed = again.wait() == 0 and "going on from" in again.log.read_text(errors="replace")
    difference = job.difference(name, reference)
    if not resumed or difference is None:
        say(again.tail())
    return {
        "fault": fault.name,
        "launcher": fault.launcher,
        "exit_code": code,
        "seconds": round(seconds, 1),
        "set_seconds": SET_SECONDS[fault.noticed],
        "clean_seconds": round(clean, 1),
        "processes_left": len(remaining),
        "steps_before": done,
        "resumed": resumed,
        "max_rel_loss_diff": difference,
    }


def measure_requeue(lab: Lab, job: Job, reference: str) -> dict[str, Any]:
    """Preempt a SLURM job: its ranks save, and the same job queues again and goes on by itself."""
    name = "slurm-requeue"
    job.copy(name)
    before = idle(lab)
    launch = Launch(lab, job, "slurm", name)
    launch.wait_for_step(6)
    # What SLURM sends before the time is up (--signal) and when it preempts.
    launch.slurm("scancel", "--signal=USR1", "{job}")
    code = launch.wait()
    said = launch.log.read_text(errors="replace")
    if code or "queues again" not in said:
        say(launch.tail())
    return {
        "exit_code": code,
        "requeued": said.count("the job queues again"),
        "resumed": "going on from" in said,
        "processes_left": len(left(lab, before)),
        "max_rel_loss_diff": job.difference(name, reference),
    }


def sound(actual: dict[str, Any]) -> bool:
    """Whether everything is as it must be."""
    requeue = [actual["requeue"]] if "requeue" in actual else []
    alike = [*actual["launchers"].values(), *actual["faults"], *requeue]
    return (
        all(
            (entry["exit_code"], entry["requeued"], entry["processes_left"]) == (0, 1, 0) and entry["resumed"]
            for entry in requeue
        )
        and all(entry["exit_code"] == 0 for entry in actual["launchers"].values())
        and all(
            entry["max_rel_loss_diff"] is not None and entry["max_rel_loss_diff"] <= TOLERANCE
            for entry in alike
        )
        and all(
            entry["exit_code"] != 0
            and entry["seconds"] <= entry["set_seconds"]
            and entry["processes_left"] == 0
            and entry["resumed"]
            for entry in actual["faults"]
        )
    )


def say(text: str) -> None:
    """Progress, on standard error."""
    print(f"cluster: {text}", file=sys.stderr, flush=True)


def table(actual: dict[str, Any]) -> str:
    """The figures for people."""
    lines = [f"{'launcher':10} {'hosts':>5} {'largest difference':>18} {'exit code':>9} {'seconds':>8}"]
    for name, entry in actual["launchers"].items():
        difference = "-" if entry["max_rel_loss_diff"] is None else f"{entry['max_rel_loss_diff']:.1e}"
        lines.append(
            f"{name:10} {entry['hosts']:5} {difference:>18} {entry['exit_code']:9} {entry['seconds']:8.1f}"
        )
    lines += ["", f"{'fault':26} {'exit code':>9} {'seconds':>8} {'left':>5} {'resumed':>8}"]
    for entry in actual["faults"]:
        what = f"{entry['launcher']}: {entry['fault']}"
        resumed = "yes" if entry["resumed"] else "no"
        lines.append(
            f"{what:26} {entry['exit_code']:9} {entry['seconds']:8.1f} {entry['processes_left']:5} {resumed:>8}"
        )
    if requeue := actual.get("requeue"):
        lines += ["", f"{REQUEUE}: {requeue['requeued']} time(s), exit code {requeue['exit_code']}"]
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    known = [*(fault.title for fault in FAULTS), REQUEUE]
    add("--hosts", type=int, default=2, choices=(2, 3, 4), help="hosts with one rank each (%(default)s)")
    add("--launcher", action="append", choices=LAUNCHERS, help="only this one; may be repeated")
    add("--fault", action="append", metavar="NAME", choices=[*known, "none"], help=f"only this one: {known}")
    add("--demo", action="store_true", help="the demonstration's model (models/gemma3-270m) for 10 steps")
    add("--json", action="store_true", help="print JSON instead of tables")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for.

    Raises:
        Failed: one host alone does not train.
    """
    launchers = options.launcher or list(LAUNCHERS)
    chosen = [
        fault
        for fault in FAULTS
        if fault.launcher in launchers and (not options.fault or fault.title in options.fault)
    ]
    actual: dict[str, Any] = {"launchers": {}, "faults": []}
    failed: list[str] = []
    begun = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="lander-cluster-") as name,
        laboratory(Path(name) / "lab", options.hosts, "slurm" in launchers) as lab,
    ):
        directory = lab.directory / "job"
        job = demo_job(directory, options.hosts) if options.demo else tiny_job(directory, options.hosts)
        say("one host")
        job.copy("single")
        reference = Launch(lab, job, "single", "single")
        if reference.wait():
            raise Failed(f"one host alone does not train:\n{reference.tail()}")
        for launcher in launchers:
            say(launcher)
            actual["launchers"][launcher] = measure_launcher(lab, job, launcher, "single")
            say(json.dumps(actual["launchers"][launcher]))
        for fault in chosen:
            say(fault.title)
            try:
                actual["faults"].append(measure_fault(lab, job, fault, "single"))
                say(json.dumps(actual["faults"][-1]))
            except Failed as error:
                say(f"{fault.title}: {error}")
                failed.append(fault.title)
        if "slurm" in launchers and (not options.fault or REQUEUE in options.fault):
            say(REQUEUE)
            actual["requeue"] = measure_requeue(lab, job, "single")
            say(json.dumps(actual["requeue"]))
    actual["seconds"] = round(time.monotonic() - begun, 1)
    actual["failed"] = failed
    actual["sound"] = sound(actual) and not failed
    return actual


def main() -> int:
    """Run; returns the exit code."""
    options = parse()
    if why := missing():
        say(f"skipped: {why}")
        print(json.dumps({"skipped": why}) if options.json else f"skipped: {why}")
        return 0
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    try:
        # Standard output is for the figures: DeepSpeed logs there.
        with redirect_stdout(sys.stderr):
            actual = measure(options)
    except Failed as error:
        say(f"error: {error}")
        return 1
    print(json.dumps(actual, indent=2) if options.json else table(actual))
    return 0 if actual["sound"] else 1


if __name__ == "__main__":
    # Ctrl-C and SIGTERM take the hosts along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
