"""What can go wrong, by whose input it was.

Every message names the file, key or line at fault and the cure. The command line prints the message without a
traceback and ends with `exit_code`; anything that is not a `LanderError` is a defect and keeps its traceback.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What the number that a process ends with means; the help text and the launchers read it here."""

    meaning: str

    def __new__(cls, code: int, meaning: str) -> ExitCode:
        member = int.__new__(cls, code)
        member._value_ = code
        member.meaning = meaning
        return member

    DONE = 0, "done"
    WRONG_INPUT = 2, "wrong input"
    DEFECT = 1, "a defect"
    NOT_SAVED = 74, "the last checkpoint could not be written"
    PREEMPTED = 75, "asked to stop (SIGTERM, SIGUSR1) and saved"
    STALLED = 76, "a rank hung"
    INTERRUPTED = 130, "interrupted"


class LanderError(Exception):
    """Base of every error that a user can cause and cure."""

    exit_code = ExitCode.WRONG_INPUT
    label = "error"
    """What the command line writes before the message."""


class ConfigError(LanderError):
    """A recipe, an override or a DeepSpeed JSON is wrong."""


class DataError(LanderError):
    """A corpus, a tokenizer or a prepared data set is missing, unreadable or unfit."""


class ModelError(LanderError):
    """A model directory is missing, incomplete or of an unknown family."""


class ArtefactError(LanderError):
    """A file that an earlier stage wrote is missing, damaged or belongs to something else."""


class DiskFull(LanderError):
    """Something could not be written for want of room."""

    exit_code = ExitCode.NOT_SAVED
