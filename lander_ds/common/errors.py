"""What can go wrong, by whose input it was.

Every message names the file, key or line at fault and the cure. The command line prints the message without a
traceback and ends with `exit_code`; anything that is not a `LanderError` is a defect and keeps its traceback.
"""

from __future__ import annotations


class LanderError(Exception):
    """Base of every error that a user can cause and cure."""

    exit_code = 2
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

    exit_code = 74
