"""One training on hosts of a lab.py: what it is, launching it with each launcher, and what a launch leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from lab import HEAD, Lab
from miniature import ROOT
from support.tiny_run import TinyRun, make_tiny_run

LEASE_SECONDS = 12.0
"""LANDER_LEASE_SECONDS: when a silent host counts as lost."""
WAIT_SECONDS = 600.0
"""No launch of this benchmark takes so long."""

SETTINGS = {
    "LANDER_LEASE_SECONDS": f"{LEASE_SECONDS:g}",
    "LANDER_RESTART_SECONDS": "1",
    "LANDER_ROOT": str(ROOT),
    "LANDER_VENV": sys.prefix,
    "OMP_NUM_THREADS": "1",
    # SLURM alone reads these: the least that is a container, and two options.
    "LANDER_CONTAINER": "unshare --mount",
    "LANDER_SRUN": "--label --cpu-bind=none",
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
        actual, wanted = self.losses(name), self.losses(reference)
        if not wanted or actual.keys() != wanted.keys():
            return None
        return max(abs(actual[step] / wanted[step] - 1.0) for step in wanted)


def tiny_job(root: Path, ranks: int, steps: int = 30) -> Job:
    """A small random model on sentences of the sample corpora."""
    root.mkdir()
    built: TinyRun = make_tiny_run(root)
    # Small parameters whole on every rank, so that a step of this model is not all waiting for one another.
    settings = {
        "zero_optimization": {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 10**6}
    }
    (root / "cluster.json").write_text(json.dumps({**settings, "steps_per_print": 10**6}), encoding="utf-8")
    overrides = [
        f"deepspeed={root / 'cluster.json'}",
        "select.layers.k=2",
        f"train.steps={steps}",
        "train.batch_tokens=768",
        "train.save_every=5",
    ]
    return Job(built.recipe_path, root, overrides, built.run, ranks)


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
    actual = []
    for host in lab.hosts:
        for process in lab.processes(host):
            with suppress(psutil.Error):
                name = process.name()
                if (host, process.pid) in before or name.startswith(("sshd", "slurm")) or name == "sleep":
                    continue
                actual.append(f"{host}: {' '.join(process.cmdline())[:200]}")
    return actual


@contextmanager
def laboratory(directory: Path, ranks: int, slurm: bool) -> Iterator[Lab]:
    """A head and one host per rank, with a hostfile."""
    nodes = [f"node{number}" for number in range(1, ranks + 1)]
    with Lab(directory, [HEAD, *nodes]) as lab:
        (directory / "hostfile").write_text("".join(f"{node} slots=1\n" for node in nodes))
        if slurm:
            lab.start_slurm()
        yield lab
