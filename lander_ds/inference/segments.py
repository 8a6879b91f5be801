"""Text to translate from files, and translations back to files: as many lines out as in, in the same order.

A line of a text file is a segment, and an empty line ends a document. A line of a JSON-lines file is an object whose `src`
is a segment, which may hold line breaks, and whose `doc` may name its document; it comes back with `hyp` beside everything
that it had. The model translates single lines (that is what it was trained on), so a segment with line breaks is translated
line by line and put together again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lander_ds.common.errors import DataError
from lander_ds.data.context import Preceding
from lander_ds.data.sources.files import read_lines, without_compression
from lander_ds.data.sources.rows import one_line
from lander_ds.inference.translations import Translation

STANDARD = "-"
"""Standard input or output."""
JSON_LINES = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True)
class Segment:
    """What stands on one line of the input."""

    line: int
    """Its number, from 1."""
    text: str
    """Source text."""
    row: Mapping[str, Any] | None
    """The whole object, of JSON lines."""

    @property
    def lines(self) -> list[str]:
        """What the model is asked to translate; empty ones are not worth asking."""
        return [one_line(line) for line in self.text.split("\n")]


class Line(NamedTuple):
    """What the model is asked to translate."""

    text: str
    """A line of a segment."""
    context: tuple[str, ...]
    """Lines before it in its document, as many as its prompt shows."""


def lines_of(segments: Sequence[Segment], context: int) -> list[list[Line]]:
    """The lines of every segment; `context`: how many before its own a prompt shows."""
    preceding, lines, document = Preceding(context), [], 0
    for segment in segments:
        if segment.row is None and not segment.text.strip():
            document += 1
        # Lines of JSON segments without a document have each other.
        own = document if segment.row is None else segment.row.get("doc") or f"line {segment.line}"
        of_segment = []
        for text in segment.lines:
            of_segment.append(Line(text, preceding.of(str(own)) if text else ()))
            if text:
                preceding.add(text)
        lines.append(of_segment)
    return lines


def is_json_lines(name: str) -> bool:
    """Whether a file holds JSON lines, by its name."""
    return without_compression(Path(name)).suffix.lower() in JSON_LINES


def read_segments(source: str, json_lines: bool) -> list[Segment]:
    """Everything in a file, plain or compressed, or in standard input.

    Raises:
        DataError: there is no such file, it is empty, or a line is not what it should be; the message has its number.
    """
    if source != STANDARD and not Path(source).is_file():
        raise DataError(f"--input {source}: no such file: correct the path, or write - for standard input")
    segments = [_segment(source, number, line, json_lines) for number, line in _lines(source)]
    if not segments:
        raise DataError(f"--input {source}: is empty: give at least one line")
    return segments


def _lines(source: str) -> Iterator[tuple[int, bytes]]:
    if source == STANDARD:
        return ((number, line.rstrip(b"\r\n")) for number, line in enumerate(sys.stdin.buffer, start=1))
    return read_lines(Path(source), lambda _: None)


def _segment(source: str, number: int, line: bytes, json_lines: bool) -> Segment:
    where = f"--input {source}, line {number}"
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{where} is not UTF-8: convert the file") from None
    if not json_lines:
        return Segment(number, text, None)
    try:
        row = json.loads(text)
    except ValueError as error:
        raise DataError(
            f"{where} is not JSON ({error}): correct it, or name a text file without {JSON_LINES[0]}"
        ) from None
    src = row.get("src") if isinstance(row, dict) else None
    if not isinstance(src, str):
        raise DataError(f'{where} has no text under "src": write {{"src": "..."}}')
    try:
        src.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where} holds half a surrogate pair, which is no text: correct it") from None
    return Segment(number, src, row)


def written(
    segments: Sequence[Segment],
    lines: Sequence[Sequence[Line]],
    translations: Mapping[Line, Translation],
    n_best: bool,
) -> str:
    """The content of the output.

    Args:
        segments: the input.
        lines: from `lines_of`.
        translations: of every line that is not empty.
        n_best: write the alternatives of every segment too, as JSON lines whatever the input is. The k-th of a segment
            with line breaks is put together of the k-th of its lines, and their scores are added up.
    """
    return "".join(
        _written(segment, [translations.get(line) for line in own], n_best) + "\n"
        for segment, own in zip(segments, lines, strict=True)
    )


def _written(segment: Segment, lines: Sequence[Translation | None], n_best: bool) -> str:
    hyp = "\n".join("" if line is None else line.hyp for line in lines)
    if segment.row is None and not n_best:
        return hyp
    row = {**(segment.row or {"src": segment.text}), "hyp": hyp}
    if n_best:
        most = max((len(line.n_best or ()) for line in lines if line is not None), default=0)
        row["n_best"] = [
            {
                "hyp": "\n".join("" if line is None else (line.n_best or ())[k].hyp for line in lines),
                "score": sum((line.n_best or ())[k].score for line in lines if line is not None),
            }
            for k in range(most)
        ]
    return json.dumps(row, ensure_ascii=False)
