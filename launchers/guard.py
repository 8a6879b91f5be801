"""Watch over the processes of a launch on one host, and end them when the launch ends or is lost.

usage: guard.py LAUNCH_DIR SECONDS

The launch holds on to it by a pipe, or by ssh. It reads words from standard input: "alive" at least every SECONDS,
"stop" to ask the ranks to save and stop. The end of its input, or silence, ends every process of the launch on this
host: the launch is over, was killed, or its host is down or cut off. They are known by LANDER_LAUNCH in their
environment, which children inherit.

Why not leave it to ssh: without a terminal sshd leaves a command running when its connection ends. SLURM ends what a
job step leaves behind, and the guard then finds nothing; but not on hosts that are reached by ssh.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
from pathlib import Path

import psutil

from lander_ds.common.errors import ExitCode

READY = "ready"
END_SECONDS, KILL_SECONDS = 5.0, 5.0


def processes(launch: str) -> list[psutil.Process]:
    """The processes of the launch on this host."""
    actual = []
    for process in psutil.process_iter():
        # Another user's, or it has just ended.
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get("LANDER_LAUNCH") == launch and process.status() != psutil.STATUS_ZOMBIE:
                actual.append(process)
    return actual


def sweep(launch: str) -> list[psutil.Process]:
    """End them; returns those that are still there."""
    actual = processes(launch)
    for process in actual:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    psutil.wait_procs(actual, timeout=END_SECONDS)
    # Those that were started meanwhile, too.
    alive = processes(launch)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return list(psutil.wait_procs(alive, timeout=KILL_SECONDS)[1])


def ask_ranks(launch: str) -> None:
    """Have the ranks save and stop; rank.py hands the signal on."""
    for process in processes(launch):
        with contextlib.suppress(psutil.Error):
            if str(Path(__file__).with_name("rank.py")) in process.cmdline():
                process.terminate()


def main(launch: str, seconds: float) -> int:
    """Watch; returns the exit code."""
    if not Path(launch).is_dir():
        sys.stderr.write(f"{launch} is not there: run_dir must be a directory that all hosts share\n")
        return ExitCode.WRONG_INPUT
    sys.stdout.write(f"{READY}\n")
    sys.stdout.flush()
    while select.select([sys.stdin], [], [], seconds)[0]:
        # Not through Python's buffer, which select does not see.
        words = os.read(sys.stdin.fileno(), 1024)
        if not words:
            break
        if b"stop" in words:
            ask_ranks(launch)
    left = sweep(launch)
    if left:
        names = ", ".join(f"{process.pid} {process.name()}" for process in left)
        sys.stderr.write(f"cannot be ended: {names}\n")
    return ExitCode.DEFECT if left else ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2])))
