"""Reading a recipe: YAML file, then `--set` overrides, then the strict build; and writing a resolved one.

Relative paths in a recipe count from the current working directory, like paths on the command line.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lander_ds.common.errors import ConfigError
from lander_ds.config.document import Document, describe, read_text
from lander_ds.config.overrides import apply_overrides
from lander_ds.config.recipe import Recipe
from lander_ds.config.strict import build
from lander_ds.config.yaml_source import dump_yaml, parse_yaml


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the YAML file `path`, changed by `overrides` (`a.b=c`).

    Raises:
        ConfigError: the file cannot be read or parsed, or keys or values are wrong (all of them at once, with
            file and line). Only types are checked here; `checks.check_recipe` does the rest.
    """
    return read_recipe(path, overrides)[0]


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> tuple[Recipe, Document]:
    """Like `load_recipe`, with the document, which knows the line that every value stands on."""
    document = parse_yaml(read_text(path, "the recipe"), str(path))
    if document.value is None:
        raise ConfigError(f"{path}: the recipe is empty; recipes/demo.yaml shows what one holds")
    if not isinstance(document.value, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of keys, found {describe(document.value)}")
    apply_overrides(document, overrides)
    return build(Recipe, document), document


def dump_recipe(recipe: Recipe) -> str:
    """The recipe with every default written out, as YAML that loads to an equal recipe."""
    return dump_yaml(_plain(asdict(recipe)))


def section(recipe: Recipe, *names: str) -> dict[str, Any]:
    """The named top-level parts of a recipe as JSON values, for the record of a stage."""
    everything = asdict(recipe)
    return json.loads(json.dumps({name: everything[name] for name in names}))  # type: ignore[no-any-return]


def _plain(value: Any) -> Any:
    """`value` with tuples as lists."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
