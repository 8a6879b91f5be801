"""Types that several sections of the recipe share: ranges of numbers, paths, names of splits and checkpoints."""

from __future__ import annotations

import os
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Limit = Annotated[int, Field(ge=1), "remove it to use everything"]
"""The text is the cure that a message about the range ends with."""
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]

Split = Literal["train", "detect", "valid", "test"]
System = Literal["base", "fewshot", "trained", "trained_fewshot"]
"""The untouched base and the trained model, each without and with examples in the prompt."""


def _at_home(path: str) -> str:
    """`path` with the home directory for a `~` or `~user` at its beginning.

    Raises:
        ValueError: there is no such user.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~") and not os.path.lexists(path):
        user = path.partition("/")[0]
        raise ValueError(
            f"{user} is no user's home directory; write the path out, or ./{user} for a name like that"
        )
    return expanded


PathText = Annotated[str, AfterValidator(_at_home)]
"""A path; `~` is the home directory."""


def _checkpoint_choice(text: str) -> str:
    if not re.fullmatch(r"last|best|step-[0-9]+", text):
        raise ValueError("expected last, best or step-N")
    return text


Quantization = Literal["int8", "nf4"]
"""What the frozen base is held in: one of 256 evenly spaced values, or one of the 16 of NF4, times a scale per block."""

CheckpointChoice = Annotated[str, AfterValidator(_checkpoint_choice)]
