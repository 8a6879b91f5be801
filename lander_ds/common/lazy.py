"""Functions that are imported when they are called: the one way in which this package imports something late.

The command line needs it, because `lander --help` must not wait seconds for PyTorch; and the doctor, because it must
start, and say what is missing, where PyTorch does not.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


def load(target: str) -> Any:
    """What `module:name` names."""
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)
