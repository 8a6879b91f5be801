"""A cache entry of prepared data being made: rows to token ids in Arrow files, what was dropped, and the manifest.

What rows there are is for `data.build` (sentence pairs) and `data.replay` (texts without a pair) to say.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import datasets
from datasets.arrow_writer import ArrowWriter

from lander_ds.common.console import ProgressTask, progress
from lander_ds.common.errors import ArtefactError, DataError
from lander_ds.common.files import file_hash, publish_entry, write_json
from lander_ds.config.schema.types import Split
from lander_ds.data.context import Preceding
from lander_ds.data.filters import Sentences
from lander_ds.data.passes import HELD_OUT, reading
from lander_ds.data.prepared import FORMAT, read_manifest, split_file
from lander_ds.data.quality import Judge, judged
from lander_ds.data.sources.corpus import Corpus
from lander_ds.data.sources.rows import Reason, Rejection, Row
from lander_ds.data.tokens.encoding import Encoded

TOKENS, DOC = datasets.List(datasets.Value("int32")), datasets.Value("string")
FEATURES = {
    "id": datasets.Value("string"),
    "src": datasets.Value("string"),
    "tgt": datasets.Value("string"),
    "input_ids": TOKENS,
    "prompt_length": datasets.Value("int32"),
    "length": datasets.Value("int32"),
}
"""Columns of every split. Where a corpus names documents or worse translations there is one more, `doc` or `rejected`."""

REJECTED_TEXT_CHARS = 200


@dataclass
class Counts:
    """What became of the lines of one split of one pair."""

    read: int = 0
    """Lines read."""
    kept: int = 0
    """Examples written."""
    tokens: int = 0
    """Their tokens, prompts included."""
    target_tokens: int = 0
    """Their target tokens, end of sequence included."""
    moved_to_detect: int = 0
    """Training examples set aside for detection."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Dropped lines by reason."""
    first_dropped: list[str] = field(default_factory=list)
    """The first few, for an error message."""
    content: str = ""
    """Hash of the examples written, whatever corpora and options they come from."""


class Keep(Protocol):
    """Filters of rows."""

    def reason(self, row: Row) -> Reason | None:
        """Why a row is dropped, or None when it is kept."""


class EntryWriter:
    """Writes the files of an entry, one split after the other, and counts what became of every line.

    Args:
        directory: of the entry.
        names: of what has splits: pairs.
        total: bytes that will be read, for the progress bar.
        context: how many sentences before its own a prompt shows.
    """

    def __init__(self, directory: Path, names: Iterable[str], total: int, context: int = 0) -> None:
        self._directory = directory
        self.counts: dict[str, dict[str, Counts]] = {name: {} for name in names}
        """Pair -> split -> what became of its lines."""
        self._rejected = (directory / "rejected.jsonl").open("w", encoding="utf-8")
        self._progress = progress("prepare (bytes)", total)
        self._context = context

    def __enter__(self) -> EntryWriter:
        self.bar: ProgressTask = self._progress.__enter__()
        """Advanced by the bytes that are read."""
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.__exit__(*error)
        self._rejected.close()

    def of(self, pair: str, split: Split) -> Counts:
        """The counts of a split."""
        return self.counts[pair].setdefault(split, Counts())

    def kept_rows(
        self, corpus: Corpus, keep: Keep, apart: Sentences | None = None, judges: Sequence[Judge] = ()
    ) -> Iterator[Row]:
        """The rows of a corpus that pass the filters, up to its limit; the others are recorded. Contexts have no sentence of
        `apart`."""
        rows = self._passing(corpus, keep, apart)
        if judges:
            rows = judged(rows, judges, lambda rejection: self.reject(corpus.pair, corpus.split, rejection))
        return islice(rows, corpus.limit)

    def _passing(self, corpus: Corpus, keep: Keep, apart: Sentences | None) -> Iterator[Row]:
        counts = self.of(corpus.pair, corpus.split)
        preceding = Preceding(self._context)
        for item in reading(corpus, self.bar):
            counts.read += 1
            if isinstance(item, Rejection):
                self.reject(corpus.pair, corpus.split, item)
                continue
            context = preceding.of(item.document)
            # What is not worth learning is part of the document all the same; but nobody may read what is kept apart.
            if self._context and item.src and not (apart and apart.overlap(item.src, item.tgt)):
                preceding.add(item.src)
            if reason := keep.reason(item):
                text = f"{item.src} | {item.tgt}"
                self.reject(corpus.pair, corpus.split, Rejection(item.file, item.line, reason, text))
            else:
                yield replace(item, context=context) if context else item

    def reject(self, pair: str, split: Split, rejection: Rejection) -> None:
        """Record a line that is dropped."""
        counts = self.of(pair, split)
        counts.dropped[rejection.reason] = counts.dropped.get(rejection.reason, 0) + 1
        text = rejection.text.encode("utf-8", "backslashreplace").decode()[:REJECTED_TEXT_CHARS]
        if len(counts.first_dropped) < 3:
            counts.first_dropped.append(
                f"{rejection.file} line {rejection.line}: {rejection.reason}: {text[:60]!r}"
            )
        record = {
            "file": rejection.file,
            "line": rejection.line,
            "reason": rejection.reason,
            "pair": pair,
            "split": split,
            "text": text,
        }
        self._rejected.write(json.dumps(record, ensure_ascii=False) + "\n")

    def write(
        self, pair: str, split: Split, examples: Iterable[tuple[Row, Encoded]], corpora: Sequence[Corpus]
    ) -> None:
        """Write the examples of a split.

        Args:
            pair, split: which.
            examples: rows with their token ids.
            corpora: where they come from.

        Raises:
            DataError: there is none.
        """
        path, content = self._directory / split_file(pair, split), hashlib.sha256()
        named = split in HELD_OUT and any(corpus.has_documents for corpus in corpora)
        preferred = any(corpus.columns.rejected for corpus in corpora)
        further = {"doc": DOC} if named else {}
        further |= {"rejected": TOKENS} if preferred else {}
        with ArrowWriter(path=str(path), features=datasets.Features(FEATURES | further)) as writer:
            counts = self.of(pair, split)
            for row, (ids, prompt_length, rejected) in examples:
                values = {"doc": row.document, "rejected": rejected}
                own = {name: values[name] for name in further}
                writer.write(
                    {
                        "id": f"{pair}:{split}:{counts.kept}",
                        "src": row.src,
                        "tgt": row.tgt,
                        "input_ids": ids,
                        "prompt_length": prompt_length,
                        "length": len(ids),
                        **own,
                    }
                )
                content.update(json.dumps([row.src, row.tgt, ids, prompt_length, *own.values()]).encode())
                counts.kept += 1
                counts.tokens += len(ids)
                counts.target_tokens += len(ids) - prompt_length
            if counts.kept == 0:
                raise _empty(pair, split, counts, corpora)
            writer.finalize()
            counts.content = content.hexdigest()


def too_many_tokens(row: Row, tokens: int) -> Rejection:
    """A row that is longer than `data.max_length`."""
    return Rejection(row.file, row.line, "too_many_tokens", f"{tokens} tokens: {row.src} | {row.tgt}")


def fill_entry(
    entry: Path, digest: str, fill: Callable[[Path], Mapping[str, Mapping[str, Counts]]], anew: bool = False
) -> dict[str, Any]:
    """Fill the cache entry `entry` unless it is there already; returns its manifest.

    Interrupted builds leave nothing, and of two builds of the same entry the first one to end wins.

    Args:
        entry: directory to make.
        digest: its full name.
        fill: writes the files into a directory, and returns what became of the lines of every split of every pair.
        anew: fill it even so, and replace what is there if it differs.

    Raises:
        DataError: as `fill`.
    """
    if not anew and (manifest := _complete(entry)) is not None:
        return manifest
    entry.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", suffix=".tmp", dir=entry.parent))
    try:
        counts = fill(temporary)
        files = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
        manifest = {
            "format": FORMAT,
            "hash": digest,
            "pairs": list(counts),
            "splits": {
                pair: {split: count.content for split, count in splits.items()}
                for pair, splits in counts.items()
            },
            "files": files,
            "statistics": {
                pair: {split: _statistics(count) for split, count in splits.items()}
                for pair, splits in counts.items()
            },
        }
        write_json(temporary / "manifest.json", manifest)
        temporary.chmod(0o755)
        # Another process may have built the same entry meanwhile; it has the same content.
        publish_entry(
            temporary,
            entry,
            lambda: _complete(entry) is not None and (not anew or file_hash(entry) == file_hash(temporary)),
        )
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def _complete(entry: Path) -> dict[str, Any] | None:
    try:
        return read_manifest(entry)
    except ArtefactError:
        return None


def _statistics(counts: Counts) -> dict[str, Any]:
    values = asdict(counts)
    del values["first_dropped"], values["content"]
    return values


def _empty(pair: str, split: Split, counts: Counts, corpora: Iterable[Corpus]) -> DataError:
    if counts.moved_to_detect:
        return DataError(
            f"train of {pair}: all {counts.moved_to_detect} examples that pass the filters were set "
            "aside for detection: lower data.detect_examples, add training data, or give a corpus with "
            "split: detect"
        )
    key = " and ".join(corpus.key for corpus in corpora)
    dropped = ", ".join(f"{reason} {count}" for reason, count in counts.dropped.items()) or "nothing"
    first = "; ".join(counts.first_dropped)
    return DataError(
        f"{split} of {pair}: nothing is left of {counts.read} lines (dropped: {dropped}; {first}): relax "
        f"data.filters or data.max_length, or correct {key}"
    )
