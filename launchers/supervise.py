"""Run a launcher's command until its ranks have done their work, and leave no process behind on any host.

Launchers lose exit codes, hang where a host is cut off, and forget processes. So the ranks leave their exit codes in
the launch directory (rank.py), and a guard on every host (guard.py) ends what is left there after each attempt.

Why not torchrun: it ends with 1 whatever its ranks ended with, starts again after wrong input (2) too, and leaves its
ranks running when it is killed itself (torch 2.13). Why not srun's exit code: it is the highest of all ranks, so that
a neighbour's 137 hides the 2 or 76 that caused it; starting again is left to SLURM, though (slurm.sbatch).
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rank import codes, exit_code, forget_codes
from tethers import Tethers

from lander_ds.common.errors import ExitCode
from lander_ds.stages import catalogue

LOST = 255
"""Exit code of a launch that lost a host, as ssh's."""
FINAL = (0, ExitCode.WRONG_INPUT, ExitCode.NOT_SAVED, ExitCode.INTERRUPTED)
"""Exit codes after which starting again cannot help."""

NEWS_SECONDS = 3.0
"""How long exit codes of ranks may take through a network file system."""
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Plan:
    """What is run."""

    command: Sequence[str]
    """Starts every rank with launchers/rank.sh LAUNCH_DIR."""
    launch_dir: Path
    ranks: int
    hosts: Sequence[str]
    """Beside this one."""
    ssh: Sequence[str]
    python: str
    """With this project's packages, on every host."""
    lease_seconds: float
    """How long a host may be silent."""
    stop_seconds: float
    """How long the ranks have to save, once asked to stop."""
    linger_seconds: float
    """How long the launcher may take to end after a rank has failed, or all have ended."""


class Requests:
    """Signals that ask the launch to stop."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.numbers.append(number)


def resumed(arguments: Sequence[str]) -> list[str]:
    """Arguments of lander_ds that go on where an earlier attempt ended."""
    kept = [argument for argument in arguments if argument != "--force"]
    return [*kept, "--auto-resume"] if catalogue.resumes(kept[0]) and "--auto-resume" not in kept else kept


def resume(launch_dir: Path) -> None:
    """Have the ranks of the next attempt go on; rank.sh reads the file."""
    path = launch_dir / "arguments"
    arguments = path.read_text(encoding="utf-8").split("\0")[:-1]
    path.write_text("".join(f"{argument}\0" for argument in resumed(arguments)), encoding="utf-8")


def cause(actual: Mapping[int, int]) -> int:
    """The exit code that tells most, of ranks that ended at about the same time; 0 if none has failed.

    What the others say may be the consequence: they lost a neighbour, or were asked to end.
    """
    failed = set(actual.values()) - {0}
    for telling in (ExitCode.WRONG_INPUT, ExitCode.NOT_SAVED, ExitCode.STALLED):
        if telling in failed:
            return telling
    if killed := {code for code in failed if code > 128}:
        return max(killed)
    return max(failed - {ExitCode.PREEMPTED}, default=ExitCode.PREEMPTED if failed else 0)


def attempt(plan: Plan, requests: Requests) -> int:
    """Run the command once; returns the exit code that tells what happened."""
    forget_codes(plan.launch_dir)
    with Tethers(plan.launch_dir, plan.hosts, plan.ssh, plan.python, plan.lease_seconds) as tethers:
        if tethers.lost:
            return LOST
        environment = {**os.environ, "LANDER_LAUNCH": str(plan.launch_dir)}
        process = subprocess.Popen(
            plan.command, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
        )
        try:
            first = _watch(plan, requests, process, tethers)
        finally:
            _end_group(process)
    return _judge(plan, requests, process.returncode, first)


def _watch(plan: Plan, requests: Requests, process: subprocess.Popen[bytes], tethers: Tethers) -> int:
    """Until the launcher ends or has to be ended; returns the exit code of what failed first, or 0."""
    first, deadline, asked = 0, float("inf"), False
    while process.poll() is None:
        now = time.monotonic()
        if requests.numbers and not asked:
            say(f"{signal.Signals(requests.numbers[0]).name}: the ranks are asked to save and stop")
            tethers.stop()
            asked, deadline = True, min(deadline, now + plan.stop_seconds)
        actual = codes(plan.launch_dir)
        if not first:
            first = cause(actual)
        if first or len(actual) == plan.ranks:
            deadline = min(deadline, now + plan.linger_seconds)
        if not first and tethers.lost:
            return LOST
        if now > deadline or len(requests.numbers) > 1:
            say("the launcher does not end: it is killed")
            return first
        time.sleep(POLL_SECONDS)
    wait = time.monotonic() + NEWS_SECONDS
    while not first and len(codes(plan.launch_dir)) < plan.ranks and time.monotonic() < wait:
        time.sleep(POLL_SECONDS)
        first = cause(codes(plan.launch_dir))
    return first or cause(codes(plan.launch_dir))


def _judge(plan: Plan, requests: Requests, returned: int, first: int) -> int:
    actual = codes(plan.launch_dir)
    if len(actual) == plan.ranks and not any(actual.values()):
        return 0
    if requests.numbers and requests.numbers[0] == signal.SIGINT:
        return ExitCode.INTERRUPTED
    if first:
        return first
    if requests.numbers:
        return 128 + requests.numbers[0]
    missing = [str(rank) for rank in range(plan.ranks) if rank not in actual]
    say(
        f"ranks {', '.join(missing)} left no exit code in {plan.launch_dir}: they were not started, or were killed "
        "together with what started them"
    )
    return exit_code(returned) or ExitCode.DEFECT


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the launcher and what it started on this host."""
    for number, seconds in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, number)
            process.wait(seconds)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def say(text: str) -> None:
    """To standard error."""
    sys.stderr.write(f"supervise: {text}\n")
    sys.stderr.flush()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--launch-dir", type=Path, required=True, help="a directory that all hosts see")
    add("--ranks", type=int, required=True, help="how many the command starts")
    add("--hosts", default="", help="hosts that it starts them on, with commas")
    add("--ssh", default="ssh", help="command and options that reach a host")
    add("--python", default=sys.executable, help="interpreter on every host")
    add("--max-restarts", type=int, default=0, help="how often the command may be started again")
    add("--attempt", type=int, default=0, help="how often it has been started before")
    add("--lease-seconds", type=float, default=60.0, help="how long a host may be silent")
    add("--stop-seconds", type=float, default=120.0, help="how long the ranks have to save")
    add("--linger-seconds", type=float, default=30.0, help="how long the launcher may outlive its ranks")
    add("--restart-seconds", type=float, default=10.0, help="pause before another attempt")
    add("command", nargs="+", help="the launcher's command")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    """Attempts until one has done its work, cannot be helped, or is the last; returns the exit code."""
    plan = Plan(
        command=options.command,
        launch_dir=options.launch_dir,
        ranks=options.ranks,
        hosts=[host for host in options.hosts.split(",") if host],
        ssh=shlex.split(options.ssh),
        python=options.python,
        lease_seconds=options.lease_seconds,
        stop_seconds=options.stop_seconds,
        linger_seconds=options.linger_seconds,
    )
    requests, number = Requests(), options.attempt
    while True:
        if number:
            resume(plan.launch_dir)
        code = attempt(plan, requests)
        if code in FINAL or requests.numbers or number >= options.max_restarts:
            return code
        number += 1
        say(f"exit code {code}: restart {number} of {options.max_restarts} in {options.restart_seconds:g} s")
        until = time.monotonic() + options.restart_seconds
        while time.monotonic() < until:
            if requests.numbers:
                return code
            time.sleep(POLL_SECONDS)


def main() -> int:
    """Run; returns the exit code."""
    options = parse()
    try:
        code = run(options)
    finally:
        shutil.rmtree(options.launch_dir, ignore_errors=True)
    if code:
        say(f"ended with exit code {code}")
    return code


if __name__ == "__main__":
    sys.exit(main())
