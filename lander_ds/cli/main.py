"""The command line: `lander STAGE --recipe FILE`, and a few commands around the stages.

One process: `lander STAGE ...`. Many: `deepspeed [launcher flags] --module lander_ds STAGE ...`, which starts
the same `main` on every rank.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
import time
import traceback
from collections.abc import Sequence

from lander_ds.cli.parser import parse
from lander_ds.common import console, launch
from lander_ds.common.errors import DiskFull, ExitCode, LanderError
from lander_ds.common.lazy import load

logger = logging.getLogger(__name__)

HEAD_START_SECONDS = 3.0
"""How much longer than rank 0 the other ranks take to fail: launchers look at their processes every second."""

GRACE_SECONDS = 5.0
"""How long a rank that lost its connection to another lets the launcher end it, before it complains."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code of the process.

    Args:
        argv: the arguments without the program's name; default those of the process.
    """
    if argv is None:
        _use_utf8()
    arguments = parse(sys.argv[1:] if argv is None else argv)
    console.setup_logging(getattr(arguments, "verbose", False))
    try:
        load(arguments.target)(arguments)
    except LanderError as error:
        _report(error)
        return _leave(error.exit_code)
    except KeyboardInterrupt:
        if launch.rank() == 0:
            sys.stderr.write("interrupted\n")
        return _leave(ExitCode.INTERRUPTED)
    except BrokenPipeError:
        # The reader of a pipe, such as `head`, has gone: Python must not try to flush what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _leave(ExitCode.DEFECT)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            _report(
                DiskFull(f"{error}: make room, then start the same command again (train with --auto-resume)")
            )
            return _leave(DiskFull.exit_code)
        if launch.world_size() == 1:
            raise
        if "by peer" in str(error):
            # Another rank failed first and says why; the launcher is about to end this one.
            time.sleep(GRACE_SECONDS)
        traceback.print_exc()
        return _leave(ExitCode.DEFECT)
    return ExitCode.DONE


def _use_utf8() -> None:
    """Write UTF-8 whatever the locale, and start again in Python's UTF-8 mode where names of files would be in another
    encoding: they, corpora and tables hold characters that ASCII and Latin-1 do not have."""
    if sys.getfilesystemencoding() != "utf-8":
        # For the processes that this one starts. This one may have been told to ignore the environment (-E, -I).
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower() not in ("utf-8", "utf8"):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def _report(error: LanderError) -> None:
    """Tell what is wrong: rank 0 at once in full, the others their first line.

    They mostly fail like rank 0, and the launcher then ends them. A rank that is left alone tells the rest.
    """
    rank = launch.rank()
    if rank == 0:
        sys.stderr.write(f"{error.label}: {error}\n")
        return
    first, _, rest = str(error).partition("\n")
    logger.error("rank %d stopped: %s", rank, first)
    time.sleep(HEAD_START_SECONDS)
    if rest:
        logger.error("rank %d stopped, in full: %s", rank, error)


def _leave(code: ExitCode) -> int:
    """The exit code; under a launcher the process ends here and now.

    Other ranks may wait for this one in a collective, which can keep an orderly exit from ever finishing. The
    launcher ends them as soon as it sees this process fail.
    """
    if launch.world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
