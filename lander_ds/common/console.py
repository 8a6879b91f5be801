"""What a person sees while a stage runs: log lines, progress bars with ETA, tables.

Only rank 0 talks; the other ranks log warnings and errors. Standard output carries results (tables, JSON), standard
error carries log lines and progress.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lander_ds.common.launch import rank

stdout = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)
logger = logging.getLogger(__name__)

LOG_INTERVAL_SECONDS = 15.0

_HARMLESS_WARNINGS = (
    # Torch announces new names of its collectives, at each of DeepSpeed's calls.
    r"`torch\.distributed\.\w+` is deprecated\. Please use `torch\.distributed\.\w+` instead",
)
"""Python warnings of other libraries that a user can do nothing about (regular expressions)."""

_HARMLESS_LINES = {
    "DeepSpeed": (
        # On every import on a machine without GPU, in every process.
        "Setting accelerator to CPU",
        # Its list of tested optimizers holds none that was subclassed.
        "You are using ZeRO with an untested optimizer",
    ),
}
"""Logger -> parts of log lines of the same kind."""


def setup_logging(verbose: bool = False) -> None:
    """Send log records of this package to standard error; other libraries only from WARNING on.

    What other libraries are known to say although all is well is left out, unless `verbose`.
    """
    level = logging.DEBUG if verbose else logging.INFO
    own = level if rank() == 0 else logging.WARNING
    logging.basicConfig(level=logging.WARNING, handlers=[_handler(verbose)], force=True)
    logging.getLogger("lander_ds").setLevel(own)
    if not verbose:
        _silence_harmless()


def _silence_harmless() -> None:
    for pattern in _HARMLESS_WARNINGS:
        warnings.filterwarnings("ignore", pattern)
    for name, parts in _HARMLESS_LINES.items():
        logging.getLogger(name).addFilter(_Without(parts))
    if not stderr.is_terminal:
        # Bars of other libraries: in a file every redrawing is a line, or makes one endless.
        os.environ.setdefault("TQDM_DISABLE", "1")


class _Without(logging.Filter):
    """Drops records that contain one of `parts`."""

    def __init__(self, parts: Sequence[str]) -> None:
        super().__init__()
        self._parts = parts

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(part in message for part in self._parts)


def _handler(verbose: bool) -> logging.Handler:
    """Wrapped and coloured on a terminal; one line per record in a file, where lines are searched and compared."""
    handler: logging.Handler
    if stderr.is_terminal:
        handler = RichHandler(console=stderr, show_path=verbose, log_time_format="[%X]", markup=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        origin = " (%(name)s, line %(lineno)d)" if verbose else ""
        handler.setFormatter(logging.Formatter(f"[%(asctime)s] %(levelname)-8s%(message)s{origin}", "%X"))
    return handler


class ProgressTask:
    """A handle on one progress bar; `advance` is cheap enough to call per item."""

    def __init__(
        self, progress: Progress | None, task: TaskID | None, description: str, total: float
    ) -> None:
        self._progress, self._task = progress, task
        self._description, self._total, self._done = description, total, 0.0
        self._last_log = -1.0

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Move the bar on by `amount` of its total and show `note` behind it."""
        self._done += amount
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=amount, note=note)
            self._log_when_not_a_terminal(note)

    def _log_when_not_a_terminal(self, note: str) -> None:
        # A bar is not drawn into a file or a CI log: there a line now and then says where the stage stands.
        if stderr.is_terminal or self._progress is None or self._task is None:
            return
        task = self._progress.tasks[0]
        elapsed = task.elapsed or 0.0
        if elapsed - self._last_log < LOG_INTERVAL_SECONDS and self._done < self._total:
            return
        self._last_log = elapsed
        rate = self._done / elapsed if elapsed > 0 else 0.0
        left = (self._total - self._done) / rate if rate > 0 else 0.0
        percent = 100.0 * self._done / self._total if self._total else 100.0
        logger.info("%s: %.0f %% (%.0f s, ETA %.0f s) %s", self._description, percent, elapsed, left, note)


@contextmanager
def progress(description: str, total: float, done: float = 0) -> Iterator[ProgressTask]:
    """A progress bar with elapsed time and ETA on standard error; silent on ranks other than 0.

    Args:
        description: what is being done, in a few words.
        total: the number of units (`ProgressTask.advance` counts in the same unit).
        done: units that an earlier start has done.
    """
    total -= done
    if rank() != 0:
        yield ProgressTask(None, None, description, total)
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=stderr,
        transient=False,
        disable=not stderr.is_terminal,
    )
    with bar:
        yield ProgressTask(bar, bar.add_task(description, total=total, note=""), description, total)


def write_line(text: str) -> None:
    """Print one line of result to standard output (rank 0 only), unwrapped."""
    if rank() == 0:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
