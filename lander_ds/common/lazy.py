"""Functions that are imported when they are called: the one way in which this package imports something late.

The command line needs it, because `lander --help` must not wait seconds for PyTorch; and the doctor, because it must
start, and say what is missing, where PyTorch does not.
"""

from __future__ import annotations

import gc
from importlib import import_module
from typing import Any


def load(target: str) -> Any:
    """What `module:name` names.

    Nothing that an import makes is garbage: the collector, which would look through all of it again and again, waits.
    That is a tenth of the time which PyTorch, transformers and DeepSpeed take together.
    """
    module, _, name = target.partition(":")
    collects = gc.isenabled()
    gc.disable()
    try:
        return getattr(import_module(module), name)
    finally:
        if collects:
            gc.enable()
