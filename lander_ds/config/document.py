"""A parsed configuration file that remembers where every value came from, and the problems found in it.

Recipes (YAML) and DeepSpeed configurations (JSON) both become a `Document`, so that every message can name
the file and line, or the `--set` override, that a value was written in.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lander_ds.common.errors import ConfigError

KeyPath = tuple[str | int, ...]


def dotted(path: KeyPath) -> str:
    """`("train", "lr", "general")` -> `train.lr.general`."""
    return ".".join(str(part) for part in path)


def lookup(value: Any, path: KeyPath) -> Any:
    """The part of a document's value at `path`, or None where there is none."""
    for part in path:
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        else:
            return None
    return value


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that `name` most probably meant, or None. Case does not count."""
    by_lower = {option.lower(): option for option in valid}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[close[0]] if close else None


def describe(value: Any) -> str:
    """A value as a message shows it: its kind and, for scalars, what it is."""
    match value:
        case None:
            return "nothing"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return f"the number {value}"
        case str():
            return f"the text {value!r}" if len(value) <= 60 else f"the text {value[:60]!r}..."
        case dict():
            return f"a mapping with {', '.join(map(str, list(value)[:4])) or 'no keys'}"
        case list():
            return f"a list of {len(value)}"
    return f"a {type(value).__name__}"


@dataclass
class Document:
    """Plain values (dict, list, str, int, float, bool, None) and where they were written."""

    name: str
    """The file, as the user named it."""
    value: Any
    """The whole document."""
    origins: dict[KeyPath, str] = field(default_factory=dict)
    """Where each key, item and section stands: `recipe.yaml, line 12` or `--set a.b=c`."""

    def origin(self, path: KeyPath) -> str:
        """Where `path`, or else the innermost section around it that was written down, stands."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return self.name

    def line(self, number: int) -> str:
        """The origin of what stands on a line of this file, counted from 1."""
        return f"{self.name}, line {number}"


class Problems:
    """Everything wrong with one document: collected, then reported together."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self._messages: list[str] = []

    def add(self, path: KeyPath, message: str) -> None:
        """Record what is wrong with the value at `path`, and the cure."""
        key = f"{dotted(path)}: " if path else ""
        text = f"{self.document.origin(path)}: {key}{message}"
        if text not in self._messages:
            self._messages.append(text)

    def error(self) -> ConfigError:
        """One line per problem."""
        if len(self._messages) == 1:
            return ConfigError(self._messages[0])
        lines = "\n".join(f"  {message}" for message in self._messages)
        return ConfigError(f"{self.document.name} has {len(self._messages)} problems:\n{lines}")

    def refuse(self) -> None:
        """Raise `error()`; do nothing when there is no problem."""
        if self._messages:
            raise self.error()


def read_text(path: Path, what: str) -> str:
    """The text of a UTF-8 file.

    Raises:
        ConfigError: it is missing, a directory, unreadable or not UTF-8. `what` says what it should be.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        folder = path.parent
        similar = nearest(path.name, (entry.name for entry in folder.iterdir())) if folder.is_dir() else None
        hint = f"; did you mean {folder / similar}?" if similar else f" (looked from {Path.cwd()})"
        raise ConfigError(f"{path}: {what} does not exist{hint}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}, line {line}: {what} is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: {what} cannot be read ({error.strerror}); name a readable file") from None
