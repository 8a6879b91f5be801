"""From a parsed document to checked values: pydantic looks for what is wrong, and here it is said for people.

The classes are the whole schema: there is no second list of keys, types or ranges.
"""

from __future__ import annotations

import json
import math
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from lander_ds.config.document import Document, KeyPath, Problems, describe, dotted, lookup, nearest
from lander_ds.config.keys import (
    field_at,
    fields_of,
    is_mapping,
    number_range,
    section_in,
    similar_keys,
)

T = TypeVar("T")

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)
"""For every section of a file: no unknown key, no conversion of types, and docstrings that `--explain` reads."""

_EXPECTED = {
    "int": "a whole number",
    "float": "a finite number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list",
    "list": "a list",
    "dict": "a mapping such as {de: ...}",
    "dataclass": "a section with keys",
    "model": "a section with keys",
}
"""First word of the name of a pydantic error -> what the value should have been."""


def build(kind: type[T], document: Document) -> T:
    """An instance of the pydantic dataclass `kind` from `document`.

    Raises:
        ConfigError: one message with every unknown key, missing key, wrong value and number out of range.
    """
    problems = Problems(document)
    # In JSON, unlike in Python, pydantic's strict mode takes a mapping for a section and a list for a tuple.
    text = json.dumps(_with_empty_sections(kind, document.value))
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        for entry in error.errors(include_url=False):
            problems.add(*explained(kind, entry, document.value))
        raise problems.error() from None


def explained(root: type, entry: ErrorDetails, value: Any) -> tuple[KeyPath, str]:
    """The key that one of pydantic's errors is about, and what is wrong with it, in our words.

    Args:
        root: the class of the whole document.
        entry: pydantic's error.
        value: the whole document.
    """
    path = entry["loc"]
    match entry["type"]:
        case "unexpected_keyword_argument":
            return path, _unknown_key(root, path)
        case "missing" if not isinstance(path[-1], int):
            return path, "this required key is missing; add it"
        case "missing" | "too_long":
            path = path[:-1] if entry["type"] == "missing" else path
            wanted = len(get_args(getattr(field_at(root, path), "annotation", None)))
            return path, f"expected a list of {wanted}, found {describe(lookup(value, path))}"
    path = _written_part(path, value)
    given, field = lookup(value, path), field_at(root, path)
    bound = next(iter(entry.get("ctx", {}).values()), None)
    kind = entry["type"].partition("_")[0]
    if entry["type"] == "literal_error" and field is not None:
        options = _options(field.annotation)
        near = nearest(str(given), options) if given is not None else None
        hint = f"; did you mean {near}?" if near else ""
        return path, f"expected one of {', '.join(options)}, found {describe(given)}{hint}"
    if kind in ("greater", "less") and field is not None and isinstance(bound, int | float):
        allowed, cure = number_range(field)
        return path, f"must be {allowed}, found {type(bound)(given)}{cure and f'; {cure}'}"
    if kind in _EXPECTED:
        return path, f"expected {_EXPECTED[kind]}, found {describe(given)}{_cure(kind, given)}"
    message = entry["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return path, f"{message[:1].lower()}{message[1:]}, found {describe(given)}"


def _with_empty_sections(kind: type, value: Any) -> Any:
    """`value` with {} for sections whose key stands there alone: they mean the defaults."""
    if value is None:
        return {}
    if isinstance(value, list):
        return [_with_empty_sections(kind, item) for item in value]
    if not isinstance(value, dict):
        return value
    fields = fields_of(kind)

    def filled(key: str, item: Any) -> Any:
        hint = fields[key].annotation if key in fields else None
        if (section := section_in(hint)) is None:
            return item
        if is_mapping(hint) and isinstance(item, dict):
            return {name: _with_empty_sections(section, inner) for name, inner in item.items()}
        return _with_empty_sections(section, item)

    return {key: filled(key, item) for key, item in value.items()}


def _written_part(location: KeyPath, value: Any) -> KeyPath:
    """`location` without names of pydantic's own at its end, such as the members of a union."""
    for length, part in enumerate(location):
        inside = (isinstance(value, dict) and part in value) or (
            isinstance(value, list) and isinstance(part, int)
        )
        if not inside:
            return location[:length]
        value = value[part]
    return location


def _unknown_key(root: type, path: KeyPath) -> str:
    field = field_at(root, path[:-1])
    section = (field and section_in(field.annotation)) or root
    similar = similar_keys(root, path, list(fields_of(section)))
    if not similar:
        return f"unknown key; {dotted(path[:-1]) or 'this file'} may have {', '.join(fields_of(section))}"
    here = "" if similar[0].rpartition(".")[0] == dotted(path[:-1]) else " here"
    return f"unknown key{here}; did you mean {' or '.join(similar)}?"


def _options(hint: Any) -> list[str]:
    """The members of every Literal in a type."""
    if get_origin(hint) is Literal:
        return [str(option) for option in get_args(hint)]
    return [option for part in get_args(hint) for option in _options(part)]


def _cure(kind: str, value: Any) -> str:
    match kind:
        case "int" if isinstance(value, float) and value.is_integer():
            return f"; write {int(value)}"
        case "int" | "float" if _is_number(value):
            return "; remove the quotes"
        case "string":
            return "; write a value or remove the key" if value is None else "; put it in quotes"
        case "tuple" | "list" if isinstance(value, str | int | float):
            return f"; write [{value}]"
    return ""


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        return False
