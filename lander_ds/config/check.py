"""What all checks of a recipe share."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from lander_ds.common import launch
from lander_ds.config.document import KeyPath, Problems, dotted
from lander_ds.config.recipe import Recipe

logger = logging.getLogger(__name__)

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class Check:
    """The recipe, the stages about to run, and the problems so far.

    Keys are dotted: `data.corpora.0.limit`.
    """

    recipe: Recipe
    stages: Collection[str] | None
    """Stages, `all` or another command such as `text` (translating some); None for a check of the whole recipe."""
    problems: Problems

    def runs(self, *stages: str) -> bool:
        """Whether one of `stages` is about to run; `all` and None run every stage."""
        return self.stages is None or not {"all", *stages}.isdisjoint(self.stages)

    def refuse(self, key: str, message: str) -> None:
        """Record what is wrong with `key`, and the cure."""
        self.problems.add(key_path(key), message)

    def refuse_repeats(self, key: str, items: Sequence[object]) -> None:
        """Record a problem when `items` holds something twice."""
        repeated = dict.fromkeys(str(item) for item in items if items.count(item) > 1)
        if repeated:
            self.refuse(key, f"{', '.join(repeated)} is given twice; name each once")

    def refuse_placeholders(self, key: str, text: str, allowed: Sequence[str]) -> None:
        """Record placeholders such as `{lang}` in `text` that nothing fills in."""
        for name in _PLACEHOLDER.findall(text):
            if name not in allowed:
                valid = ", ".join(f"{{{option}}}" for option in allowed)
                cure = f"it may use {valid}" if allowed else "nothing is filled in here; write it out"
                self.refuse(key, f"unknown placeholder {{{name}}}; {cure}")

    def warn(self, key: str, message: str) -> None:
        """Tell that `key` has no effect or is risky."""
        if launch.rank() == 0:
            path = key_path(key)
            logger.warning("%s: %s: %s", self.problems.document.origin(path), dotted(path), message)


def key_path(key: str) -> KeyPath:
    """`data.corpora.0` -> `("data", "corpora", 0)`."""
    return tuple(int(part) if part.isdecimal() else part for part in key.split("."))
