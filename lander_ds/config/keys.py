"""The keys that a schema knows: of the recipe's dataclasses and of DeepSpeed's models alike, both pydantic's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, get_args, get_origin

from pydantic.fields import FieldInfo

from lander_ds.config.document import KeyPath, dotted, nearest

_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def fields_of(section: type) -> dict[str, FieldInfo]:
    """Every key of a section; aliases, the documented names, come first."""
    fields: dict[str, FieldInfo] = section.__pydantic_fields__  # type: ignore[attr-defined]
    return {field.alias: field for field in fields.values() if field.alias} | fields


def meaning(section: type, name: str) -> str:
    """The docstring of a key: the section's own, or that of the class that it has the key from."""
    fields = (getattr(kind, "__pydantic_fields__", {}).get(name) for kind in section.__mro__)
    return next((field.description for field in fields if field is not None and field.description), "")


def is_mapping(hint: Any) -> bool:
    """Whether a key holds a mapping from names to sections, `dict[str, Section]`."""
    return get_origin(hint) is dict and section_in(hint) is not None


def section_in(hint: Any) -> type | None:
    """The class of the section in `Section`, `Section | None`, `tuple[Section, ...]` or `dict[str, Section]`."""
    for part in (hint, *get_args(hint)):
        if isinstance(part, type) and hasattr(part, "__pydantic_fields__"):
            return part
    return None


def key_paths(section: type, prefix: KeyPath = ()) -> Iterator[KeyPath]:
    """The path of every key of a section and of the sections inside it; indices and names of items are left out."""
    for name, field in fields_of(section).items():
        yield (*prefix, name)
        inner = section_in(field.annotation)
        if inner:
            yield from key_paths(inner, (*prefix, name))


def field_at(section: type, path: KeyPath) -> FieldInfo | None:
    """The field that describes the key at `path`, or the list or mapping whose item it is."""
    field, inner, named = None, section, False
    for part in path:
        if isinstance(part, str) and not named:
            fields = fields_of(inner)
            if part not in fields:
                break
            field = fields[part]
            inner = section_in(field.annotation) or inner
            named = is_mapping(field.annotation)
        else:
            named = False
    return field


def similar_keys(root: type, path: KeyPath, siblings: list[str]) -> list[str]:
    """What the unknown key at `path` may have meant: the nearest of its siblings, or else its namesakes elsewhere."""
    near = nearest(str(path[-1]), siblings)
    if near:
        return [dotted((*path[:-1], near))]
    return [dotted(other) for other in key_paths(root) if other[-1] == path[-1]]


def number_range(field: FieldInfo) -> tuple[str, str]:
    """The range of a field's numbers, `at least 0 and below 1`, and the cure beside it; empty where there is none."""
    constraints = list(_constraints(field))
    bounds = [
        f"{word} {getattr(constraint, name)}"
        for name, word in _BOUNDS.items()
        for constraint in constraints
        if hasattr(constraint, name)
    ]
    cures = [constraint for constraint in constraints if isinstance(constraint, str)]
    return " and ".join(dict.fromkeys(bounds)), "".join(cures[:1])


def _constraints(hint: Any) -> Iterator[Any]:
    """Everything that is annotated to a type and the types inside it."""
    if isinstance(hint, FieldInfo):
        yield from hint.metadata
        yield from _constraints(hint.annotation)
    elif get_origin(hint) is Annotated:
        for extra in hint.__metadata__:
            yield from extra.metadata if isinstance(extra, FieldInfo) else [extra]
        yield from _constraints(hint.__origin__)
    else:
        for part in get_args(hint):
            yield from _constraints(part)
