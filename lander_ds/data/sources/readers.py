"""Reading corpora: every format becomes a stream of rows and rejections.

Nothing here holds more than one line (or one TMX unit, or one batch of an HF data set) in memory.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import chain, islice, repeat, zip_longest
from typing import Any

from lander_ds.common.errors import DataError
from lander_ds.data.sources.corpus import Corpus
from lander_ds.data.sources.files import Advance, read_lines
from lander_ds.data.sources.hf import read_hf
from lander_ds.data.sources.mappings import Located, rows_of_mappings
from lander_ds.data.sources.rows import Rejection, Row, make_row
from lander_ds.data.sources.tmx import read_tmx

WIDTH_LINES = 100_000
"""Lines of a TSV file without a header that say how many columns it has."""


def read(corpus: Corpus, advance: Advance = lambda count: None) -> Iterator[Row | Rejection]:
    """Stream a corpus in the direction of its pair.

    Args:
        corpus: what to read.
        advance: told about the bytes read, for a progress bar.

    Raises:
        DataError: the file is empty, broken, or not what the recipe says; or not one line of it holds a
            sentence pair (or text).
    """
    readers: Mapping[str, Callable[[Corpus, Advance], Iterator[Row | Rejection]]] = {
        "jsonl": _read_jsonl,
        "tsv": _read_tsv,
        "moses": _read_moses,
        "tmx": read_tmx,
        "hf": read_hf,
        "text": _read_text,
    }
    rejected: Counter[str] = Counter()
    first: Rejection | None = None
    usable = False
    for item in readers[corpus.format](corpus, advance):
        if isinstance(item, Rejection):
            rejected[item.reason] += 1
            first = first or item
            yield item
        else:
            usable = True
            yield replace(item, src=item.tgt, tgt=item.src) if corpus.swap else item
    if usable:
        return
    if first is None:
        raise DataError(f"{corpus.name}: is empty ({corpus.key}.path): give a corpus with {corpus.content}s")
    counts = ", ".join(f"{reason} {count}" for reason, count in rejected.items())
    raise DataError(
        f"{corpus.name}: not one line holds a {corpus.content} ({counts}; first: line {first.line}: "
        f"{first.text[:80]!r}): check that the file is UTF-8 text of format {corpus.format}, or set "
        f"{corpus.key}.format and .columns"
    )


def _decoded_lines(corpus: Corpus, advance: Advance) -> Iterator[tuple[int, str | Rejection]]:
    """Lines that are not blank, as text."""
    for number, line in read_lines(corpus.paths[0], advance):
        if line.strip():
            try:
                yield number, line.decode()
            except UnicodeDecodeError:
                yield number, _not_utf8(corpus.name, number, line)


def _not_utf8(file: str, number: int, line: bytes) -> Rejection:
    return Rejection(file, number, "invalid_utf8", line.decode(errors="backslashreplace"))


def _read_text(corpus: Corpus, advance: Advance) -> Iterator[Row | Rejection]:
    for number, line in _decoded_lines(corpus, advance):
        yield line if isinstance(line, Rejection) else make_row(corpus.name, number, "", line)


def _read_jsonl(corpus: Corpus, advance: Advance) -> Iterator[Row | Rejection]:
    return rows_of_mappings(corpus, _json_objects(corpus, advance))


def _json_objects(corpus: Corpus, advance: Advance) -> Iterator[Located]:
    first = True
    for number, line in _decoded_lines(corpus, advance):
        if isinstance(line, Rejection):
            yield line
            continue
        if first and line.lstrip().startswith("["):
            raise DataError(
                f"{corpus.name}: line {number}: is a JSON array, not JSON lines: write one object per line, "
                f"e.g. with jq -c '.[]' {corpus.paths[0].name}"
            )
        first = False
        try:
            value: Any = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            value = None
        if isinstance(value, dict):
            yield number, value
        else:
            yield Rejection(corpus.name, number, "malformed", line)


def _read_tsv(corpus: Corpus, advance: Advance) -> Iterator[Row | Rejection]:
    numbers_only = all(name.isdecimal() for name in corpus.columns.named)
    return rows_of_mappings(corpus, _tsv_rows(corpus, advance, header=not numbers_only))


def _tsv_rows(corpus: Corpus, advance: Advance, header: bool) -> Iterator[Located]:
    # Tab-separated corpora do not quote, so a quotation mark is text. Columns can be had by number and, with a
    # header, by name. Without a header most lines say how many there are.
    names: list[str] = []
    width = 0 if header else _usual_width(corpus)
    for number, line in _decoded_lines(corpus, advance):
        if isinstance(line, Rejection):
            yield line
            continue
        fields = line.split("\t")
        if header and not names:
            names, width = [field.strip() for field in fields], len(fields)
            _check_header(corpus, names)
            continue
        if len(fields) != width:
            yield Rejection(corpus.name, number, "malformed", line)
        else:
            numbered = {str(position): field for position, field in enumerate(fields)}
            yield number, numbered | dict(zip(names, fields, strict=False))


def _usual_width(corpus: Corpus) -> int:
    """The number of fields of most lines that have the asked columns; 0 when none has them."""
    asked = 1 + max(map(int, corpus.columns.named))
    lines = (line for _, line in read_lines(corpus.paths[0], lambda count: None) if line.strip())
    widths = Counter(line.count(b"\t") + 1 for line in islice(lines, WIDTH_LINES))
    fitting = {width: count for width, count in widths.items() if width >= asked}
    # Of equally frequent widths the one that was seen first.
    return max(fitting, key=lambda width: fitting[width], default=0)


def _check_header(corpus: Corpus, names: list[str]) -> None:
    for column in (*corpus.columns.texts, *corpus.columns.scores):
        if column is not None and column not in names and not column.isdecimal():
            shown = ", ".join(repr(name[:30]) for name in names[:8])
            raise DataError(
                f"{corpus.name}: line 1: no column {column!r} in the header ({shown}): set "
                f"{corpus.key}.columns to header "
                "names, or to 0-based numbers when there is no header, e.g. columns: {src: 0, tgt: 1}"
            )


def _read_moses(corpus: Corpus, advance: Advance) -> Iterator[Row | Rejection]:
    source, target, *documents = corpus.paths
    # Names of documents need only differ, whatever they are written in.
    names = read_lines(documents[0], lambda _: None) if documents else ()
    of = chain((line.decode(errors="backslashreplace") for _, line in names), repeat(None))
    count = {source: 0, target: 0}
    for left, right in zip_longest(read_lines(source, advance), read_lines(target, advance)):
        document = next(of, None)
        for path, side in ((source, left), (target, right)):
            count[path] += side is not None
        if left is None or right is None:
            continue
        number = left[0]
        try:
            yield make_row(corpus.name, number, left[1].decode(), right[1].decode(), document=document)
        except UnicodeDecodeError:
            yield _not_utf8(corpus.name, number, left[1] + b" | " + right[1])
    if count[source] != count[target]:
        raise DataError(
            f"{source} has {count[source]} lines, but {target} has {count[target]}: the two sides of a Moses "
            "pair must correspond line by line; get or make them again"
        )
