"""From a parsed document to nested frozen dataclasses, with every type checked and every problem reported.

The dataclass definitions are the whole schema: there is no second list of keys.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lander_ds.config.document import Document, KeyPath, Problems, describe, dotted, nearest

T = TypeVar("T")

_INVALID: Any = object()
"""Stands for a value that was refused; its problem is recorded and the object is never built."""


def build(kind: type[T], document: Document) -> T:
    """An instance of the dataclass `kind` from `document`.

    Raises:
        ConfigError: one message with every unknown key, missing key and wrong value of the document.
    """
    problems = Problems(document)
    result = _Builder(kind, problems).convert(kind, document.value, ())
    problems.refuse()
    built: T = result
    return built


@cache
def field_types(kind: type) -> dict[str, Any]:
    """Resolved type of every field of a dataclass."""
    return get_type_hints(kind)


def key_paths(kind: type, prefix: KeyPath = ()) -> Iterator[KeyPath]:
    """Path of every key of a dataclass and of the dataclasses inside it; list indices are left out."""
    for name, hint in field_types(kind).items():
        yield (*prefix, name)
        for inner in (hint, *get_args(hint)):
            if dataclasses.is_dataclass(inner) and isinstance(inner, type):
                yield from key_paths(inner, (*prefix, name))


class _Builder:
    def __init__(self, root: type, problems: Problems) -> None:
        self.root, self.problems = root, problems

    def convert(self, kind: Any, value: Any, path: KeyPath) -> Any:
        """`value` as `kind`, or `_INVALID` with the reason recorded."""
        origin, arguments = get_origin(kind), get_args(kind)
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            return self._section(kind, value, path)
        if origin in (types.UnionType, Union):
            if value is None:
                return None
            return self.convert(next(a for a in arguments if a is not types.NoneType), value, path)
        if origin is Literal:
            return self._choice(arguments, value, path)
        if origin is tuple:
            return self._list(arguments, value, path)
        if origin is dict:
            return self._mapping(arguments[1], value, path)
        return self._scalar(kind, value, path)

    def _section(self, kind: type, value: Any, path: KeyPath) -> Any:
        if value is None:
            value = {}
        if not isinstance(value, dict):
            return self._refuse(path, f"expected a section with keys, found {describe(value)}")
        types_, values, valid = field_types(kind), {}, True
        for key, item in value.items():
            if key in types_:
                values[key] = self.convert(types_[key], item, (*path, key))
            else:
                self._refuse((*path, key), self._unknown_key(key, path, types_))
                valid = False
        for entry in dataclasses.fields(kind):
            optional = (
                entry.default is not dataclasses.MISSING or entry.default_factory is not dataclasses.MISSING
            )
            if entry.name not in values and not optional:
                self._refuse((*path, entry.name), "this required key is missing; add it")
                valid = False
        if not valid or any(item is _INVALID for item in values.values()):
            return _INVALID
        return kind(**values)

    def _unknown_key(self, key: str, path: KeyPath, siblings: dict[str, Any]) -> str:
        near = nearest(key, siblings)
        if near:
            return f"unknown key; did you mean {dotted((*path, near))}?"
        elsewhere = [dotted(other) for other in key_paths(self.root) if other[-1] == key]
        if elsewhere:
            return f"unknown key here; did you mean {' or '.join(elsewhere)}?"
        where = dotted(path) or "this file"
        return f"unknown key; {where} may have {', '.join(siblings)}"

    def _choice(self, options: tuple[Any, ...], value: Any, path: KeyPath) -> Any:
        if isinstance(value, str) and value in options:
            return value
        near = nearest(str(value), options) if value is not None else None
        hint = f"; did you mean {near}?" if near else ""
        return self._refuse(path, f"expected one of {', '.join(options)}, found {describe(value)}{hint}")

    def _list(self, arguments: tuple[Any, ...], value: Any, path: KeyPath) -> Any:
        if not isinstance(value, list):
            hint = f"; write [{value}]" if isinstance(value, str | int | float) else ""
            return self._refuse(path, f"expected a list, found {describe(value)}{hint}")
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) != len(value):
            return self._refuse(path, f"expected a list of {len(kinds)}, found {describe(value)}")
        items = [
            self.convert(kind, item, (*path, index))
            for index, (kind, item) in enumerate(zip(kinds, value, strict=True))
        ]
        return _INVALID if any(item is _INVALID for item in items) else tuple(items)

    def _mapping(self, kind: Any, value: Any, path: KeyPath) -> Any:
        if not isinstance(value, dict):
            return self._refuse(path, f"expected a mapping such as {{de: ...}}, found {describe(value)}")
        items = {key: self.convert(kind, item, (*path, key)) for key, item in value.items()}
        return _INVALID if any(item is _INVALID for item in items.values()) else items

    def _scalar(self, kind: type, value: Any, path: KeyPath) -> Any:
        found = describe(value)
        if kind is bool:
            return (
                value
                if isinstance(value, bool)
                else self._refuse(path, f"expected true or false, found {found}")
            )
        if kind is int:
            if isinstance(value, int) and not isinstance(value, bool):
                return value
            whole = isinstance(value, float) and value.is_integer()
            hint = f"; write {int(value)}" if whole else "; remove the quotes" if _is_number(value) else ""
            return self._refuse(path, f"expected a whole number, found {found}{hint}")
        if kind is float:
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                return float(value)
            hint = "; remove the quotes" if _is_number(value) else ""
            return self._refuse(path, f"expected a finite number, found {found}{hint}")
        if isinstance(value, str):
            return value
        hint = "; put it in quotes" if value is not None else "; write a value or remove the key"
        return self._refuse(path, f"expected text, found {found}{hint}")

    def _refuse(self, path: KeyPath, message: str) -> Any:
        self.problems.add(path, message)
        return _INVALID


def _is_number(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False
