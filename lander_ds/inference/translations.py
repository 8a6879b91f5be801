"""Translations on disk, one JSON line per sentence: finished files, and partial files of an interrupted run.

`translations/<system>/<pair>.jsonl` holds the finished translations in corpus order. While they are made,
every rank appends to `translations/<system>/partial-<key>/<pair>.rank-<r>.jsonl`, where the key stands for
everything that the result depends on; so a later run, on any number of ranks, goes on where the earlier one
stopped and never mixes translations of different options, data or checkpoints.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from lander_ds.common.errors import ArtefactError
from lander_ds.common.files import write_text

CURE = "run stage translate (again)"


@dataclass(frozen=True)
class Alternative:
    """One of the best translations of a sentence, or one of its samples."""

    hyp: str
    """Its text."""
    score: float
    """Logarithm of its probability, divided by its length to the power of `translate.length_penalty`."""


@dataclass(frozen=True)
class Translation:
    """One translated sentence."""

    id: str
    """Identifier of the sentence in its split."""
    src: str
    """Source text."""
    ref: str
    """Reference translation."""
    hyp: str
    """The system's translation; may be empty."""
    tokens: int
    """Generated tokens, the closing one included."""
    truncated: bool | None = None
    """Whether it was cut short at `translate.max_new_tokens`; None where that is not known."""
    n_best: tuple[Alternative, ...] | None = None
    """The best translations, or samples as they were drawn, `hyp` first, where several were wanted."""
    doc: str | None = None
    """The document that the sentence belongs to, where it is known."""


def write_translations(path: Path, translations: Sequence[Translation]) -> None:
    """Write a finished file; it is either the old one or the whole new one."""
    write_text(path, "".join(_line(translation) for translation in translations))


def read_translations(path: Path) -> list[Translation]:
    """Read a finished file.

    Raises:
        ArtefactError: the file is missing, a line is damaged, or an identifier occurs twice.
    """
    if not path.exists():
        raise ArtefactError(f"{path} does not exist: {CURE}")
    by_id: dict[str, Translation] = {}
    for number, line in enumerate(_lines(path), start=1):
        translation = _parse(line)
        if translation is None:
            raise ArtefactError(
                f"{path}, line {number} is not a translation (id, src, ref, hyp, tokens): {CURE}"
            )
        if translation.id in by_id:
            raise ArtefactError(f"{path}, line {number} repeats the sentence id {translation.id!r}: {CURE}")
        by_id[translation.id] = translation
    return list(by_id.values())


class PartialTranslations:
    """What an interrupted run of one system has finished, and where this run appends.

    Args:
        directory: `translations/<system>`.
        key: hash of everything the translations depend on.
    """

    def __init__(self, directory: Path, key: str) -> None:
        self._system = directory
        self._directory = directory / f"partial-{key[:16]}"

    def finished(self, pair: str) -> dict[str, Translation]:
        """Translations of `pair` that any rank of any earlier run has finished, by sentence id.

        A line that a crash cut short is left out; its sentence is translated again.
        """
        by_id: dict[str, Translation] = {}
        for path in sorted(self._directory.glob(f"{pair}.rank-*.jsonl")):
            for line in _lines(path):
                if (translation := _parse(line)) is not None:
                    by_id[translation.id] = translation
        return by_id

    @contextmanager
    def appender(self, pair: str, rank: int) -> Iterator[Appender]:
        """Open the file that `rank` appends its translations of `pair` to."""
        self._directory.mkdir(parents=True, exist_ok=True)
        with Appender(self._directory / f"{pair}.rank-{rank}.jsonl") as appender:
            yield appender

    def discard(self, every: bool = False) -> None:
        """Delete the partial files of this key, or of every key (one rank only)."""
        for path in self._system.glob("partial-*") if every else [self._directory]:
            shutil.rmtree(path, ignore_errors=True)


class Appender:
    """Appends finished translations to a partial file, a whole batch at a time."""

    def __init__(self, path: Path) -> None:
        self._torn = path.exists() and not path.read_bytes().endswith(b"\n")
        self._stream = path.open("a", encoding="utf-8")

    def append(self, translations: Sequence[Translation]) -> None:
        """Write a batch and flush it, so that a crash loses at most the batch in work."""
        # A crash may have left half a line without its end: the next line must not be glued to it.
        self._stream.write("\n" * self._torn + "".join(map(_line, translations)))
        self._stream.flush()
        self._torn = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stream.close()


def _line(translation: Translation) -> str:
    fields = asdict(translation)
    for name in ("n_best", "doc"):
        if fields[name] is None:
            del fields[name]
    return json.dumps(fields, ensure_ascii=False) + "\n"


def _lines(path: Path) -> list[bytes]:
    return [line for line in path.read_bytes().split(b"\n") if line]


def _parse(line: bytes) -> Translation | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    if not isinstance(value, Mapping):
        return None
    texts = [value.get(name) for name in ("id", "src", "ref", "hyp")]
    id_, src, ref, hyp = (text if isinstance(text, str) else None for text in texts)
    # Files of version 0.1 do not say whether a translation is truncated.
    tokens, truncated, doc = (value.get(name) for name in ("tokens", "truncated", "doc"))
    if id_ is None or src is None or ref is None or hyp is None or not isinstance(tokens, int):
        return None
    try:
        n_best = tuple(Alternative(**one) for one in value["n_best"]) if "n_best" in value else None
    except TypeError:
        return None
    return Translation(
        *(id_, src, ref, hyp, tokens),
        truncated=truncated if isinstance(truncated, bool) else None,
        n_best=n_best,
        doc=doc if isinstance(doc, str) else None,
    )
