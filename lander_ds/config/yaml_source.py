"""YAML as recipes use it: the core types of YAML 1.2, line numbers kept, duplicate keys refused.

PyYAML alone reads YAML 1.1, where `off` and `no` are booleans, `1e-4` is text and `010` is eight. Here `true`
and `false` are the only booleans, `1e-4` is a number, and everything else that is no plain number is text.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from lander_ds.common.errors import ConfigError
from lander_ds.config.document import Document, KeyPath, Problems, describe

_TYPES: list[tuple[str, str, str]] = [
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+)"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("merge", r"<<", "<"),
]


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for name, pattern, first in _TYPES:
        for letter in [*first, *([""] if name == "null" else [])]:
            table.setdefault(letter, []).append((f"tag:yaml.org,2002:{name}", re.compile(f"(?:{pattern})$")))
    return table


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _resolvers()


class _Dumper(yaml.SafeDumper):
    # The same table decides which texts need quotes.
    yaml_implicit_resolvers = _resolvers()


def dump_yaml(value: Any) -> str:
    """`value` as YAML that `parse_yaml` reads back equal."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def parse_yaml(text: str, name: str) -> Document:
    """Parse one YAML document.

    Raises:
        ConfigError: syntax errors, duplicate keys, keys that are not text, several documents.
    """
    document = Document(name, None)
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is not None:
                problems = Problems(document)
                document.value = _Reader(loader, document, problems).read(node, (), ())
                problems.refuse()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = document.line(mark.line + 1) if mark else name
        what = ", ".join(part for part in (error.context, error.problem) if part)
        cure = "indent with spaces" if "\\t" in what else "check brackets, quotes, colons and indentation"
        raise ConfigError(f"{place}: not valid YAML ({what}); {cure}") from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise ConfigError(
            f"{document.line(line)}: YAML allows no control character #x{error.character:04x}; remove it"
        ) from None
    return document


class _Reader:
    """Turns YAML nodes into plain values and notes their lines."""

    def __init__(self, loader: _Loader, document: Document, problems: Problems) -> None:
        self.loader, self.document, self.problems = loader, document, problems
        self._flattened: set[int] = set()

    def read(self, node: yaml.Node, path: KeyPath, parents: tuple[yaml.Node, ...]) -> Any:
        self.document.origins.setdefault(path, self.document.line(node.start_mark.line + 1))
        if any(node is parent for parent in parents):
            self.problems.add(path, "an alias that contains itself; write the value out")
            return None
        parents = (*parents, node)
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            return self._mapping(node, path, parents)
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [self.read(item, (*path, index), parents) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
            return self._scalar(node, path)
        self.problems.add(path, f"the tag {node.tag} is not supported; remove it")
        return None

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        if node.tag == _MERGE:
            # `<<` as a value is text: only as a key does it merge.
            return node.value
        try:
            value = self.loader.construct_object(node)
        except (ValueError, KeyError):
            # An explicit tag that the text does not fit, such as `!!int abc`.
            kind = node.tag.rpartition(":")[2]
            self.problems.add(path, f"{describe(node.value)} is no {kind}; correct it or remove the tag")
            return None
        if not _can_be_shown(value):
            self.problems.add(path, "is no Unicode text, or a number of thousands of digits; correct it")
        return value

    def _mapping(
        self, node: yaml.MappingNode, path: KeyPath, parents: tuple[yaml.Node, ...]
    ) -> dict[str, Any]:
        # An aliased node is met again after its merge keys were expanded.
        if id(node) not in self._flattened:
            self._refuse_duplicates(node, path)
            self.loader.flatten_mapping(node)
            self._flattened.add(id(node))
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.loader.construct_object(key_node, deep=True)
            here = (*path, key if isinstance(key, str) else str(key_node.value))
            self.document.origins[here] = self.document.line(key_node.start_mark.line + 1)
            if isinstance(key, str) and _can_be_shown(key):
                result[key] = self.read(value_node, here, parents)
            else:
                self.problems.add(here, f"a key must be text, found {describe(key)}; put it in quotes")
        return result

    def _refuse_duplicates(self, node: yaml.MappingNode, path: KeyPath) -> None:
        # Runs before merge keys are expanded: a key may override one that `<<` brings in.
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            line, here = key_node.start_mark.line + 1, (*path, key_node.value)
            if key_node.value in lines:
                self.document.origins[here] = self.document.line(line)
                self.problems.add(here, f"given twice, first on line {lines[key_node.value]}; remove one")
            lines[key_node.value] = line


def _can_be_shown(value: Any) -> bool:
    """False for text with half of a surrogate pair and for numbers that Python refuses to print."""
    try:
        str(value).encode("utf-16", "surrogatepass").decode("utf-16")
    except ValueError:
        return False
    return True


_MERGE = "tag:yaml.org,2002:merge"
_SCALARS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "merge")}
