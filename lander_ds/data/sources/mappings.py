"""From keyed rows (JSON objects, TSV lines, HF data sets) to sentence pairs, by the recipe's columns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from lander_ds.common.errors import DataError
from lander_ds.data.sources.corpus import TEXT, Corpus
from lander_ds.data.sources.rows import Rejection, Row, lookup, make_row
from lander_ds.data.tokens.languages import normalise_code

Located: TypeAlias = tuple[int, Mapping[str, Any]] | Rejection
"""A row with its line number, or a line that is none."""


def rows_of_mappings(corpus: Corpus, located: Iterable[Located]) -> Iterator[Row | Rejection]:
    """The sentence pairs of keyed rows; language columns, when given, pass over rows of other languages.

    Raises:
        DataError: no row has a column that the recipe names, none is of the corpus's languages, or a score is no number.
    """
    columns = corpus.columns
    wanted = [(columns.src_lang, corpus.src), (columns.tgt_lang, corpus.tgt)]
    languages = [(column, normalise_code(code)) for column, code in wanted if column is not None]
    # A text need not have a prompt.
    names = [*columns.texts, *(column for column, _ in languages)]
    never_seen = set(names)
    keys: list[str] = []
    matched = False
    other_languages: set[str] = set()
    for item in located:
        if isinstance(item, Rejection):
            yield item
            continue
        line, row = item
        keys = keys or [key for key in row if not key.isdecimal()] or list(row)
        values: dict[str, Any] = {}
        for name in names:
            try:
                values[name] = lookup(row, name)
            except KeyError:
                continue
        never_seen.difference_update(values)
        if len(values) < len(set(names)):
            missing = next(name for name in names if name not in values)
            yield Rejection(corpus.name, line, "malformed", f"no {missing!r} in {dict(row)!r}")
            continue
        if len(other_languages) < 20:
            other_languages.add("-".join(str(values[column]) for column, _ in languages))
        if all(normalise_code(str(values[column])) == code for column, code in languages):
            matched = True
            src, tgt = values.get(columns.src, ""), values[columns.tgt]
            scores = tuple((name, _score(corpus, line, row, name)) for name in columns.scores)
            document = values.get(columns.doc) if columns.doc else None
            document = None if document in (None, "") else str(document)
            # Null is an empty text: None would say that there is no such column.
            rejected = (values[columns.rejected] or "") if columns.rejected else None
            yield make_row(corpus.name, line, src, tgt, scores, corpus.pair != TEXT, document, rejected)
    if keys and never_seen:
        missing = next(name for name in names if name in never_seen)
        shown = ", ".join(repr(key[:30]) for key in keys[:12])
        raise DataError(
            f"{corpus.name}: no line has {missing!r} (the first has {shown}): set {corpus.key}.columns"
        )
    if keys and languages and not matched and other_languages:
        shown = ", ".join(sorted(other_languages))
        raise DataError(
            f"{corpus.name}: no line is {corpus.src}-{corpus.tgt} (found {shown}): correct "
            f"{corpus.key}.columns.src_lang and .tgt_lang, or .pairs"
        )


def _score(corpus: Corpus, line: int, row: Mapping[str, Any], column: str) -> float:
    """What a column of `columns.scores` says."""
    try:
        value = lookup(row, column)
        # Tables hold text; true and false are numbers to Python.
        score = math.nan if isinstance(value, bool) else float(value)
    except KeyError:
        fault = "is not there"
    except (TypeError, ValueError):
        fault = f"is {value!r}"
    else:
        if math.isfinite(score):
            return score
        fault = f"is {value!r}"
    raise DataError(
        f"{corpus.name}: line {line}: the score {column!r} {fault}, which is no finite number: correct the line or take it "
        f"out, or correct {corpus.key}.columns.scores"
    )
