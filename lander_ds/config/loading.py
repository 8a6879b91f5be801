"""Reading a recipe: YAML file, then `--set` overrides, then types and ranges; and writing a resolved one.

Relative paths in a recipe count from the current working directory, like paths on the command line.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from lander_ds.common.errors import ConfigError
from lander_ds.config.document import Document, KeyPath, describe, dotted, read_text
from lander_ds.config.recipe import Recipe
from lander_ds.config.strict import build
from lander_ds.config.yaml_source import dump_yaml, parse_yaml


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the YAML file `path`, changed by `overrides` (`a.b=c`).

    Raises:
        ConfigError: the file cannot be read or parsed, or keys, types or ranges are wrong (all of them at once,
            with file and line). `preflight.recipe.check_recipe` does the rest.
    """
    return read_recipe(path, overrides)[0]


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> tuple[Recipe, Document]:
    """Like `load_recipe`, with the document, which knows the line that every value stands on."""
    document = parse_yaml(read_text(path, "the recipe"), str(path))
    if document.value is None:
        raise ConfigError(f"{path}: the recipe is empty; recipes/demo.yaml shows what one holds")
    if not isinstance(document.value, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of keys, found {describe(document.value)}")
    for override in overrides:
        _apply(override, document)
    return build(Recipe, document), document


def dump_recipe(recipe: Recipe) -> str:
    """The recipe with every default written out, as YAML that loads to an equal recipe."""
    return dump_yaml(_plain(recipe))


def section(recipe: Recipe, *names: str) -> dict[str, Any]:
    """The named top-level parts of a recipe as JSON values, for the record of a stage."""
    everything = _plain(recipe)
    return {name: everything[name] for name in names}


def _plain(recipe: Recipe) -> dict[str, Any]:
    plain: dict[str, Any] = TypeAdapter(Recipe).dump_python(recipe, mode="json")
    return plain


def _apply(override: str, document: Document) -> None:
    """Write `key=value` into the document. The value is YAML; list items go by their number.

    Raises:
        ConfigError: not `key=value`, a value that is not YAML, or a path through something without such a
            part. Unknown keys are left to `strict.build`, which knows the valid ones.
    """
    origin = f"--set {override}"
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"{origin}: write it as --set key=value, for example --set train.lr.general=1e-4")
    path: KeyPath = tuple(int(part) if part.isdecimal() else part for part in parts)
    try:
        value = parse_yaml(text, origin).value
    except ConfigError as error:
        quoted = f"--set '{key.strip()}=\"...\"'"
        raise ConfigError(f"{error} (put text with YAML punctuation in quotes: {quoted})") from None
    document.value = _replaced(document.value, path, value, (), origin)
    document.origins = {p: where for p, where in document.origins.items() if p[: len(path)] != path}
    for length in range(1, len(path)):
        document.origins.setdefault(path[:length], origin)
    document.origins[path] = origin


def _replaced(container: Any, path: KeyPath, value: Any, done: KeyPath, origin: str) -> Any:
    """`container` with `value` at `path`; sections that are missing are added. `done` leads to the container."""
    if not path:
        return value
    part, rest = path[0], path[1:]
    if container is None and isinstance(part, int):
        raise ConfigError(f"{origin}: {dotted(done)} is not in the recipe; set the whole list")
    if isinstance(container, list):
        if not isinstance(part, int) or part > len(container):
            raise ConfigError(
                f"{origin}: {dotted(done)} is a list of {len(container)}, {part} is none of its items; "
                f"name one by its number, 0 to {len(container)} (the last adds one)"
            )
        items = [*container, None] if part == len(container) else list(container)
        items[part] = _replaced(items[part], rest, value, (*done, part), origin)
        return items
    if container is not None and not isinstance(container, dict):
        raise ConfigError(f"{origin}: {dotted(done)} is {describe(container)} and has no part named {part}")
    name, section = str(part), container or {}
    return {**section, name: _replaced(section.get(name), rest, value, (*done, name), origin)}
