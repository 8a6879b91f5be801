"""Nested mappings as flat ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def flatten(value: Mapping[str, Any] | Sequence[Any], lists: bool = False) -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`.

    Args:
        value: what to flatten.
        lists: also take lists and tuples apart, `a.0`; empty containers are then values like any other.
    """
    flat: dict[str, Any] = {}
    for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
        nested = isinstance(item, Mapping | list | tuple) if lists else isinstance(item, Mapping)
        if nested and (item or not lists):
            flat |= {f"{key}.{name}": inner for name, inner in flatten(item, lists).items()}
        else:
            flat[str(key)] = item
    return flat
