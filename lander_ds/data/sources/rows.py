"""What readers yield: sentence pairs, and lines that hold none."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Reason = Literal[
    "invalid_utf8",
    "malformed",
    "empty",
    "too_short",
    "too_long",
    "length_ratio",
    "identical",
    "no_preference",
    "low_score",
    "test_overlap_exact",
    "test_overlap_normalised",
    "training_overlap_exact",
    "training_overlap_normalised",
    "duplicate",
    "low_quality",
    "too_many_tokens",
]
"""Why a line is dropped, in the order in which the reasons are tried."""

_LINE_BREAKS = re.compile("[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]+")


@dataclass(frozen=True, slots=True)
class Row:
    """One sentence pair of a corpus, stripped and on one line; or a text without a pair, stripped."""

    file: str
    """Where it stands."""
    line: int
    """Line number from 1 (row number in an HF data set; the line of `</tu>` in TMX)."""
    src: str
    """Source text; what stands before a text without a pair, or nothing."""
    tgt: str
    """Target text; the text without a pair."""
    scores: tuple[tuple[str, float], ...] = ()
    """The columns that `columns.scores` names, with what they say."""
    document: str | None = None
    """The document that it belongs to, of those that name one."""
    context: tuple[str, ...] = ()
    """Source sentences before it in its document, as many as a prompt shows."""
    rejected: str | None = None
    """A worse translation, of corpora that have one."""

    @property
    def texts(self) -> tuple[str, ...]:
        """Source, target, and the worse translation where there is one."""
        return (self.src, self.tgt, *(() if self.rejected is None else (self.rejected,)))


@dataclass(frozen=True, slots=True)
class Rejection:
    """A line that is dropped."""

    file: str
    """Where it stands."""
    line: int
    """Line number from 1."""
    reason: Reason
    """Why it is dropped."""
    text: str
    """What stands there, for a person to look at."""


def make_row(
    file: str,
    line: int,
    src: Any,
    tgt: Any,
    scores: tuple[tuple[str, float], ...] = (),
    one_lined: bool = True,
    document: str | None = None,
    rejected: Any = None,
) -> Row | Rejection:
    """A row, or its rejection: `malformed` when a value is no text, `invalid_utf8` when it is no UTF-8.

    Args:
        file, line: where it stands.
        src, tgt, scores: its values.
        one_lined: write every text on one line.
        document: that it belongs to.
        rejected: a worse translation, of corpora that have one.
    """
    texts = [src, tgt, *([] if rejected is None else [rejected])]
    if not all(isinstance(text, str) for text in texts):
        return Rejection(file, line, "malformed", f"not texts: {', '.join(map(repr, texts))}")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return Rejection(file, line, "invalid_utf8", repr(" | ".join(texts)))
    clean = one_line if one_lined else str.strip
    worse = None if rejected is None else clean(rejected)
    return Row(file, line, clean(src), clean(tgt), scores, document, rejected=worse)


def one_line(text: str) -> str:
    """`text` stripped, its line breaks and tabs turned into spaces: prompts and outputs are line-based."""
    return _LINE_BREAKS.sub(" ", text).strip()


def lookup(row: Mapping[str, Any], column: str) -> Any:
    """The value of a column; dots reach into nested mappings unless a column has the whole name.

    Raises:
        KeyError: there is no such column.
    """
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if not isinstance(value, Mapping):
            raise KeyError(column)
        value = value[part]
    return value
