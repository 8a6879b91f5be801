"""Another system's translations, from a file, to test the recipe's systems against (`score.baseline`)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lander_ds.common.errors import DataError
from lander_ds.data.sources.files import read_lines, without_compression
from lander_ds.data.tokens.languages import split_pair
from lander_ds.inference.translations import Translation

_SOME = 3


@dataclass(frozen=True)
class _Row:
    """One translation of the file."""

    line: int
    hyp: str
    ref: str | None


def baseline_path(pattern: str, pair: str) -> Path:
    """The file of a pair: `{pair}`, `{src}` and `{tgt}` are filled in."""
    src, tgt = split_pair(pair)
    for name, value in {"pair": pair, "src": src, "tgt": tgt}.items():
        pattern = pattern.replace(f"{{{name}}}", value)
    return Path(pattern)


def read_baseline(path: Path, sentences: Sequence[Translation]) -> list[Translation]:
    """The translations of a file, in the order of `sentences`.

    Args:
        path: `.jsonl` (or `.json`, `.ndjson`) with `id` and `hyp` per line, or else text with one translation
            per line; plain or compressed.
        sentences: what another system translated: these identifiers, in corpus order.

    Raises:
        DataError: the file is missing or damaged, or does not hold exactly these sentences.
    """
    if not path.is_file():
        raise DataError(f"score.baseline: {path}: no such file: correct the path, or remove score.baseline")
    if without_compression(path).suffix.lower() in (".jsonl", ".json", ".ndjson"):
        return _by_identifier(path, sentences)
    lines = [text for _, text in _texts(path)]
    if len(lines) != len(sentences):
        raise DataError(
            f"score.baseline: {path} has {len(lines)} lines, and {len(sentences)} sentences are scored (those "
            "that the filters and translate.limit leave): give one translation per sentence in their order, or "
            "JSON lines with id and hyp"
        )
    return [replace(sentence, hyp=text.strip()) for sentence, text in zip(sentences, lines, strict=True)]


def _by_identifier(path: Path, sentences: Sequence[Translation]) -> list[Translation]:
    rows: dict[str, _Row] = {}
    for number, line in _texts(path):
        if not line.strip():
            continue
        identifier, row = _row(path, number, line)
        if identifier in rows:
            first = rows[identifier].line
            raise DataError(f"{_line(path, number)} repeats the id {identifier!r} of line {first}: keep one")
        rows[identifier] = row
    known = {sentence.id for sentence in sentences}
    if unknown := [(row.line, identifier) for identifier, row in rows.items() if identifier not in known]:
        number, identifier = unknown[0]
        raise DataError(
            f"{_line(path, number)}: {len(unknown)} ids are not among the {len(known)} that are scored, first "
            f"{identifier!r}: use the ids of translations/, such as {sentences[0].id!r}"
        )
    if missing := [sentence.id for sentence in sentences if sentence.id not in rows]:
        some = ", ".join(map(repr, missing[:_SOME]))
        raise DataError(
            f"score.baseline: {path} lacks {len(missing)} of the {len(known)} sentences that are scored, such "
            f"as {some}: add them, or lower translate.limit"
        )
    return [
        replace(sentence, hyp=row.hyp, ref=sentence.ref if row.ref is None else row.ref)
        for sentence, row in ((sentence, rows[sentence.id]) for sentence in sentences)
    ]


def _row(path: Path, number: int, line: str) -> tuple[str, _Row]:
    try:
        value: Any = json.loads(line)
    except ValueError as error:
        raise DataError(f"{_line(path, number)} is not JSON ({error}): correct it") from None
    fields = value if isinstance(value, Mapping) else {}
    identifier, hyp, ref = (fields.get(name) for name in ("id", "hyp", "ref"))
    if not isinstance(identifier, str) or not isinstance(hyp, str) or not isinstance(ref, str | None):
        raise DataError(f'{_line(path, number)} is no translation: write {{"id": "...", "hyp": "..."}}')
    return identifier, _Row(number, hyp, ref)


def _texts(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in read_lines(path, lambda _: None):
        try:
            yield number, line.decode("utf-8")
        except UnicodeDecodeError:
            raise DataError(f"{_line(path, number)} is not UTF-8: convert the file") from None


def _line(path: Path, number: int) -> str:
    return f"score.baseline: {path}, line {number}"
