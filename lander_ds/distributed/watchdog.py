"""A thread per rank that notices when nothing happens any more, finds out which rank hangs, and ends the job.

When one rank hangs, all others wait for it in a collective. So every rank writes down where its main thread is; those
that are in no collective, or write nothing because they are stopped or gone, are the ones to look at.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

from lander_ds.common.errors import ExitCode
from lander_ds.common.files import write_json
from lander_ds.distributed import collectives, process_group

logger = logging.getLogger(__name__)

GRACE_SECONDS = 10.0
"""How long reports of the other ranks are waited for."""
_PACKAGE = str(Path(__file__).parents[1])


class Watchdog:
    """Watches over one stage. `beat` says that the main thread is alive."""

    def __init__(self, directory: Path, seconds: float, stage: str) -> None:
        """Prepare (collective).

        Args:
            directory: where reports are written, shared by all ranks; emptied.
            seconds: longest time without a beat; 0 switches the watchdog off.
            stage: its name, for messages.
        """
        self._directory, self._seconds, self._stage = directory, seconds, stage
        self._main = threading.main_thread().ident
        self._last, self._doing = time.monotonic(), "starting"
        self._ended, self._telling = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if process_group.rank() == 0:
            shutil.rmtree(directory, ignore_errors=True)
        collectives.barrier()

    def __enter__(self) -> Watchdog:
        self.beat("starting")
        if self._seconds > 0:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._telling.is_set():
            # Another rank has told already and left, so that this one lost it: not what ended the job.
            self._thread.join()
        self._ended.set()

    def beat(self, doing: str) -> None:
        """Something has finished; `doing` comes next."""
        self._last, self._doing = time.monotonic(), doing

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._seconds / 4)):
            quiet = time.monotonic() - self._last
            if quiet > self._seconds:
                self._telling.set()
                try:
                    self._tell(quiet)
                except Exception:
                    # A full disk, for example, must not keep the job from ending.
                    logger.exception(
                        "%s: nothing has happened for %.0f s; the job is ended", self._stage, quiet
                    )
                finally:
                    sys.stderr.flush()
                    os._exit(ExitCode.STALLED)

    def _tell(self, quiet: float) -> None:
        """Write this rank's report, wait for the others, and have one rank log the verdict."""
        rank, ranks = process_group.rank(), process_group.world_size()
        write_json(
            self._path(rank),
            {"rank": rank, "host": os.uname().nodename, "doing": self._doing, **self._place()},
        )
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline and len(self._reports(ranks)) < ranks:
            time.sleep(0.1)
        reports = self._reports(ranks)
        if rank == min(reports):
            logger.error("%s", verdict(self._stage, quiet, reports, ranks))

    def _place(self) -> dict[str, Any]:
        """Where the main thread is: the innermost collective, and the innermost line of this package."""
        frames = traceback.extract_stack(sys._current_frames()[self._main or 0])
        inside = [name for frame in frames if (name := _collective(frame))]
        own = [frame for frame in frames if frame.filename.startswith(_PACKAGE)]
        line = own[-1] if own else frames[-1]
        return {
            "collective": inside[-1] if inside else None,
            "place": f"{Path(line.filename).name}:{line.lineno} in {line.name}",
        }

    def _reports(self, ranks: int) -> dict[int, dict[str, Any]]:
        found = {}
        for rank in range(ranks):
            if self._path(rank).exists():
                found[rank] = json.loads(self._path(rank).read_text(encoding="utf-8"))
        return found

    def _path(self, rank: int) -> Path:
        return self._directory / f"rank-{rank}.json"


def _collective(frame: traceback.FrameSummary) -> str | None:
    """The collective that a frame is in, or None."""
    path = Path(frame.filename)
    if path.name == "distributed_c10d.py":
        return frame.name
    # ZeRO-3 begins its collectives early and waits for them later, by methods of handles.
    if frame.name == "wait" and "deepspeed" in path.parts:
        return f"DeepSpeed's {path.name}:{frame.lineno}"
    return None


def verdict(stage: str, quiet: float, reports: dict[int, dict[str, Any]], ranks: int) -> str:
    """What to tell: which ranks hang, and in which collective the others wait.

    Args:
        stage: name of the stage.
        quiet: seconds without a beat.
        reports: rank -> host, doing, collective (None: in none), place.
        ranks: number of ranks.
    """
    silent = [rank for rank in range(ranks) if rank not in reports]
    stuck = [report for report in reports.values() if report["collective"] is None]
    waiting = [report for report in reports.values() if report["collective"] is not None]
    lines = [f"{stage}: nothing has happened for {quiet:.0f} s; the job is ended"]
    lines += [
        f"  rank {rank} does not answer: it is stopped or gone, or its host is cut off" for rank in silent
    ]
    lines += [
        f"  rank {report['rank']} on {report['host']} hangs outside any collective: {report['doing']}, "
        f"{report['place']}"
        for report in stuck
    ]
    lines += [
        f"  rank {report['rank']} on {report['host']} waits in {report['collective']}: {report['doing']}, "
        f"{report['place']}"
        for report in waiting
    ]
    lines.append(
        "start the same command again (train, all: with --auto-resume); train.stall_seconds sets the time"
    )
    return "\n".join(lines)
