"""Run one rank: hand signals on to it, and leave its exit code where the launch looks for it.

usage: rank.py LAUNCH_DIR RANK COMMAND...

Launchers lose exit codes: pdsh ends with 0 when it is itself killed, DeepSpeed's launcher turns 75 into 1.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

PR_SET_PDEATHSIG = 1
"""Linux, prctl(2): the signal that a process gets when its parent ends."""
HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def codes(directory: Path) -> dict[int, int]:
    """Rank -> exit code, of the ranks that have ended."""
    return {
        int(path.stem.removeprefix("rank-")): int(path.read_text(encoding="utf-8"))
        for path in directory.glob("rank-*.code")
    }


def forget_codes(directory: Path) -> None:
    """Before another attempt."""
    for path in directory.glob("rank-*.code"):
        path.unlink()


def exit_code(returned: int) -> int:
    """As a shell tells it: 128 and the number, where a signal ended the process."""
    return 128 - returned if returned < 0 else returned


def end_with_parent() -> None:
    """Have this process end when its parent is killed: launchers know the parent alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main(directory: Path, rank: int, command: list[str]) -> int:
    """Run the rank; returns its exit code."""
    # There are no threads here that could hold a lock while forking.
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=end_with_parent)  # noqa: PLW1509

    def hand_on(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    for number in HANDED_ON:
        signal.signal(number, hand_on)
    code = exit_code(process.wait())
    # A launch that has ended does not want it any more.
    if directory.is_dir():
        beside = directory / f".rank-{rank}.{os.getpid()}"
        beside.write_text(str(code), encoding="utf-8")
        beside.replace(directory / f"rank-{rank}.code")
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
