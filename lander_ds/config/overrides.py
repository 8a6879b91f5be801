"""`--set a.b=c`: changes to a recipe from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lander_ds.common.errors import ConfigError
from lander_ds.config.document import Document, KeyPath, describe, dotted
from lander_ds.config.yaml_source import parse_yaml


def apply_overrides(document: Document, overrides: Sequence[str]) -> None:
    """Write every `key=value` into `document`, in order. Values are YAML; list items go by their index.

    Raises:
        ConfigError: not `key=value`, a value that is not YAML, or a path through something without such a
            part. Unknown keys are left to `strict.build`, which knows the valid ones.
    """
    for override in overrides:
        place = f"--set {override}"
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not key or any(not part for part in key.split(".")):
            raise ConfigError(
                f"{place}: write it as --set key=value, for example --set train.lr.general=1e-4"
            )
        path: KeyPath = tuple(int(part) if part.isdecimal() else part for part in key.split("."))
        try:
            value = parse_yaml(text, place).value
        except ConfigError as error:
            raise ConfigError(
                f"{error} (put text with YAML punctuation in quotes: --set '{key}=\"...\"')"
            ) from None
        document.value = _replaced(document.value, path, value, (), place)
        document.places = {p: where for p, where in document.places.items() if p[: len(path)] != path}
        for length in range(1, len(path)):
            document.places.setdefault(path[:length], place)
        document.places[path] = place


def _replaced(container: Any, path: KeyPath, value: Any, done: KeyPath, place: str) -> Any:
    """`container` with `value` at `path`; sections that are missing are made."""
    if not path:
        return value
    part, rest = path[0], path[1:]
    if container is None and isinstance(part, int):
        raise ConfigError(f"{place}: {dotted(done)} is not in the recipe; set the whole list")
    if container is None:
        container = {}
    if isinstance(container, dict):
        name = str(part)
        container[name] = _replaced(container.get(name), rest, value, (*done, name), place)
    elif isinstance(container, list):
        if not isinstance(part, int) or part > len(container):
            raise ConfigError(
                f"{place}: {dotted(done)} is a list of {len(container)}, {part} is none of its items; "
                f"name one by its number, 0 to {len(container)} (the last adds one)"
            )
        if part == len(container):
            container.append(None)
        container[part] = _replaced(container[part], rest, value, (*done, part), place)
    else:
        raise ConfigError(f"{place}: {dotted(done)} is {describe(container)} and has no part named {part}")
    return container
