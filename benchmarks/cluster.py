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
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from lab import HEAD, Lab, missing
from miniature import ROOT, TinyRun, make_tiny_run

LAUNCHERS = ("pdsh", "openmpi", "mpirun", "slurm")
TOLERANCE = 1e-5
"""Largest relative difference of a step's loss."""
STALL_SECONDS = 40.0
"""train.stall_seconds, where it counts: when the watchdog ends a training in which nothing happens."""
LEASE_SECONDS = 12.0
"""LANDER_LEASE_SECONDS: when a silent host counts as lost."""
SET_SECONDS = {"lease": LEASE_SECONDS + 30.0, "stall": STALL_SECONDS + 45.0, "at once": 45.0}
"""How long a launcher may take to end after a fault that it notices so. Watchdogs wait for one another, launchers for
their processes, guards for what they end; the machine's two cores do all of it."""
WAIT_SECONDS = 600.0
"""No launch of this benchmark takes so long."""

SETTINGS = {
    "LANDER_LEASE_SECONDS": f"{LEASE_SECONDS:g}",
    "LANDER_RESTART_SECONDS": "1",
    "LANDER_ROOT": str(ROOT),
    "LANDER_VENV": sys.prefix,
    "OMP_NUM_THREADS": "1",
}


class Failed(Exception):
    """A launch did something else than it should; the message holds the end of its output."""


@dataclass(frozen=True)
class Job:
    """One training, in as many run directories as it has launches."""

    recipe: Path
    runs: Path
    overrides: Sequence[str]
    copy: Callable[[str], object]
    """Makes the run directory of a name, with everything before stage train."""
    ranks: int

    def arguments(self, name: str, overrides: Sequence[str] = ()) -> list[str]:
        """Of lander_ds."""
        own = [f"run_dir={self.run_dir(name)}", *self.overrides, *overrides]
        return [
            "train",
            "--recipe",
            str(self.recipe),
            *(f"--set={override}" for override in own),
            "--auto-resume",
        ]

    def run_dir(self, name: str) -> Path:
        """Where the launch `name` trains."""
        return self.runs / name

    def losses(self, name: str) -> dict[int, float]:
        """Step -> loss; the last one where a step was done twice."""
        path = self.run_dir(name) / "metrics.jsonl"
        if not path.exists():
            return {}
        # The last line may not be whole yet.
        lines = path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
        records = [json.loads(line) for line in lines]
        return {record["step"]: record["loss"] for record in records if "loss_per_pair" in record}

    def difference(self, name: str, reference: str) -> float | None:
        """Largest relative difference of a step's loss; None where one has other steps."""
        found, wanted = self.losses(name), self.losses(reference)
        if not wanted or found.keys() != wanted.keys():
            return None
        return max(abs(found[step] / wanted[step] - 1.0) for step in wanted)


def tiny_job(root: Path, ranks: int) -> Job:
    """A small random model on sentences of the sample corpora."""
    root.mkdir()
    made: TinyRun = make_tiny_run(root)
    # Small parameters whole on every rank, so that a step of this model is not all waiting for one another.
    settings = {
        "zero_optimization": {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 10**6}
    }
    (root / "cluster.json").write_text(json.dumps({**settings, "steps_per_print": 10**6}), encoding="utf-8")
    overrides = [
        f"deepspeed={root / 'cluster.json'}",
        "select.layers.k=2",
        "train.steps=30",
        "train.batch_tokens=768",
        "train.save_every=5",
    ]
    return Job(made.recipe_path, root, overrides, made.run, ranks)


def demo_job(root: Path, ranks: int) -> Job:
    """The demonstration, with fewer steps; its first stages run here, on one process."""
    recipe = ROOT / "recipes" / "demo.yaml"
    root.mkdir()
    before = root / "before"
    for stage in ("prepare", "detect", "select"):
        command = [sys.executable, "-m", "lander_ds", stage, "--recipe", recipe, "--set", f"run_dir={before}"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)

    def copy(name: str) -> None:
        subprocess.run(["cp", "-r", before, root / name], check=True)

    overrides = ["train.steps=10", "train.save_every=2"]
    return Job(recipe, root, overrides, copy, ranks)


class Launch:
    """A launcher at work on the head."""

    def __init__(
        self,
        lab: Lab,
        job: Job,
        launcher: str,
        name: str,
        options: Sequence[str] = (),
        overrides: Sequence[str] = (),
    ) -> None:
        """Start it.

        Args:
            lab, job: where, and what.
            launcher: one of LAUNCHERS, or "single".
            name: of the run directory.
            options: of the launcher.
            overrides: of the recipe.
        """
        self.lab, self.job, self.launcher, self.name = lab, job, launcher, name
        self.log = lab.directory / f"{name}.log"
        script = str(ROOT / "launchers" / f"{launcher}.sh")
        hostfile = ["--hostfile", str(lab.directory / "hostfile")]
        commands = {
            "single": [script, "--ranks", str(job.ranks)],
            "slurm": [
                "sbatch",
                f"--nodes={job.ranks}",
                f"--output={self.log}",
                str(ROOT / "launchers" / "slurm.sbatch"),
            ],
        }
        command = [*commands.get(launcher, [script, *hostfile]), *options, *job.arguments(name, overrides)]
        self._submission = lab.directory / f"{name}.sbatch.log"
        output = self._submission if launcher == "slurm" else self.log
        self._process = lab.start(HEAD, command, output, SETTINGS, ROOT)
        self._slurm_job = self._submitted() if launcher == "slurm" else ""

    def wait(self, seconds: float = WAIT_SECONDS) -> int:
        """Until it ends; returns its exit code, which is negative where a signal ended it.

        Raises:
            Failed: it does not end.
        """
        try:
            return self._wait_for_slurm(seconds) if self._slurm_job else self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise Failed(f"{self.name} has not ended after {seconds:.0f} s:\n{self.tail()}") from None

    def wait_for_step(self, step: int) -> None:
        """Until the training has done that step.

        Raises:
            Failed: it ended before.
        """
        deadline = time.monotonic() + WAIT_SECONDS
        while max(self.job.losses(self.name), default=0) < step:
            if self._process.poll() not in (None, 0) or time.monotonic() > deadline:
                self.kill()
                raise Failed(f"{self.name} did not reach step {step}:\n{self.tail()}")
            time.sleep(0.02)

    def process(self) -> psutil.Process:
        """The launcher itself, which its caller would send signals to."""
        return psutil.Process(self._process.pid).children()[0]

    def rank_on(self, host: str) -> psutil.Process:
        """A rank there."""
        return next(process for process in self.lab.processes(host) if is_rank(process))

    def kill(self) -> None:
        """End it the hard way."""
        with suppress(psutil.Error, IndexError):
            self.process().kill()
        if self._slurm_job:
            self.slurm("scancel", self._slurm_job)

    def tail(self) -> str:
        """The end of its output."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-3000:] if self.log.exists() else ""

    def slurm(self, *command: str) -> str:
        """A SLURM command on the head; {job} is this job."""
        return self.lab.run(HEAD, [part.replace("{job}", self._slurm_job) for part in command])

    def _submitted(self) -> str:
        code, said = self._process.wait(WAIT_SECONDS), self._submission.read_text(encoding="utf-8")
        if code:
            raise Failed(f"sbatch failed:\n{said}")
        return said.split()[-1]

    def _wait_for_slurm(self, seconds: float) -> int:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            shown = self.slurm("scontrol", "show", "job", "-o", "{job}")
            facts = dict(part.split("=", 1) for part in shown.split() if "=" in part)
            if facts["JobState"] not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED"):
                code, _, number = facts["ExitCode"].partition(":")
                return int(code) or -int(number)
            time.sleep(0.3)
        raise subprocess.TimeoutExpired("sbatch", seconds)


def is_rank(process: psutil.Process) -> bool:
    """Whether it is a rank of lander_ds."""
    with suppress(psutil.Error):
        # rank.py has the same words in its own arguments.
        return process.cmdline()[1:4] == ["-u", "-m", "lander_ds"]
    return False


def idle(lab: Lab) -> set[tuple[str, int]]:
    """Host and number of every process there is, when nothing is launched."""
    return {(host, process.pid) for host in lab.hosts for process in lab.processes(host)}


def left(lab: Lab, before: set[tuple[str, int]]) -> list[str]:
    """Processes on all hosts that were not there before, beside those of sshd itself and of SLURM."""
    found = []
    for host in lab.hosts:
        for process in lab.processes(host):
            with suppress(psutil.Error):
                name = process.name()
                if (host, process.pid) in before or name.startswith(("sshd", "slurm")) or name == "sleep":
                    continue
                found.append(f"{host}: {' '.join(process.cmdline())[:200]}")
    return found


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


def sound(found: dict[str, Any]) -> bool:
    """Whether everything is as it must be."""
    alike = [*found["launchers"].values(), *found["faults"]]
    return (
        all(entry["exit_code"] == 0 for entry in found["launchers"].values())
        and all(
            entry["max_rel_loss_diff"] is not None and entry["max_rel_loss_diff"] <= TOLERANCE
            for entry in alike
        )
        and all(
            entry["exit_code"] != 0
            and entry["seconds"] <= entry["set_seconds"]
            and entry["processes_left"] == 0
            and entry["resumed"]
            for entry in found["faults"]
        )
    )


@contextmanager
def laboratory(directory: Path, ranks: int, slurm: bool) -> Iterator[Lab]:
    """A head and one host per rank, with a hostfile."""
    nodes = [f"node{number}" for number in range(1, ranks + 1)]
    with Lab(directory, [HEAD, *nodes]) as lab:
        (directory / "hostfile").write_text("".join(f"{node} slots=1\n" for node in nodes))
        if slurm:
            lab.start_slurm()
        yield lab


def say(text: str) -> None:
    """Progress, on standard error."""
    print(f"cluster: {text}", file=sys.stderr, flush=True)


def table(found: dict[str, Any]) -> str:
    """The figures for people."""
    lines = [f"{'launcher':10} {'hosts':>5} {'largest difference':>18} {'exit code':>9} {'seconds':>8}"]
    for name, entry in found["launchers"].items():
        difference = "-" if entry["max_rel_loss_diff"] is None else f"{entry['max_rel_loss_diff']:.1e}"
        lines.append(
            f"{name:10} {entry['hosts']:5} {difference:>18} {entry['exit_code']:9} {entry['seconds']:8.1f}"
        )
    lines += ["", f"{'fault':26} {'exit code':>9} {'seconds':>8} {'left':>5} {'resumed':>8}"]
    for entry in found["faults"]:
        what = f"{entry['launcher']}: {entry['fault']}"
        resumed = "yes" if entry["resumed"] else "no"
        lines.append(
            f"{what:26} {entry['exit_code']:9} {entry['seconds']:8.1f} {entry['processes_left']:5} {resumed:>8}"
        )
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    known = [fault.title for fault in FAULTS]
    add("--hosts", type=int, default=2, choices=(2, 3, 4), help="hosts with one rank each (%(default)s)")
    add("--launcher", action="append", choices=LAUNCHERS, help="only this one; may be repeated")
    add("--fault", action="append", metavar="NAME", choices=[*known, "none"], help=f"only this one: {known}")
    add("--demo", action="store_true", help="the demonstration's model (models/gemma3-270m) for 10 steps")
    add("--json", action="store_true", help="print JSON instead of tables")
    return parser.parse_args(arguments)


def main() -> int:
    """Run; returns the exit code."""
    options = parse()
    if why := missing():
        say(f"skipped: {why}")
        print(json.dumps({"skipped": why}) if options.json else f"skipped: {why}")
        return 0
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    launchers = options.launcher or list(LAUNCHERS)
    chosen = [
        fault
        for fault in FAULTS
        if fault.launcher in launchers and (not options.fault or fault.title in options.fault)
    ]
    found: dict[str, Any] = {"launchers": {}, "faults": []}
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
            say(reference.tail())
            return 1
        for launcher in launchers:
            say(launcher)
            found["launchers"][launcher] = measure_launcher(lab, job, launcher, "single")
            say(json.dumps(found["launchers"][launcher]))
        for fault in chosen:
            say(fault.title)
            try:
                found["faults"].append(measure_fault(lab, job, fault, "single"))
                say(json.dumps(found["faults"][-1]))
            except Failed as error:
                say(f"{fault.title}: {error}")
                failed.append(fault.title)
    found["seconds"] = round(time.monotonic() - begun, 1)
    found["failed"] = failed
    found["sound"] = sound(found) and not failed
    print(json.dumps(found, indent=2) if options.json else table(found))
    return 0 if found["sound"] else 1


if __name__ == "__main__":
    # Ctrl-C and SIGTERM take the hosts along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
