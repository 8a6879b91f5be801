"""Building prepared data: corpora to filtered, tokenised Arrow files, streaming, named by content."""

from __future__ import annotations

import hashlib
import heapq
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets.arrow_writer import ArrowWriter

from lander_ds.common.console import progress
from lander_ds.common.errors import ArtefactError, DataError
from lander_ds.common.files import json_hash, publish_entry, write_json
from lander_ds.config.recipe import Recipe, Split
from lander_ds.data.filters import Filter, Sentences
from lander_ds.data.passes import HELD_OUT, held_out, reading, shots_of, size_of
from lander_ds.data.prepared import (
    FEATURES,
    FORMAT,
    corpus_options,
    prepared_options,
    read_manifest,
    split_file,
)
from lander_ds.data.sources.corpus import Corpus
from lander_ds.data.sources.rows import Rejection, Row
from lander_ds.data.tokens.encoding import Encoded, Encoder
from lander_ds.data.tokens.prompt import seeded_hash

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


@dataclass(frozen=True)
class TrainedOn:
    """What a test set that has an entry of its own needs to know of the training data."""

    sentences: Sentences
    """Of which the set must have none."""
    shots: Mapping[str, list[tuple[str, str]]]
    """Pair -> the examples that stand in every prompt (`data.prompt.shots`)."""


def entry_hash(recipe: Recipe, corpora: list[Corpus], contents: Mapping[str, str], tokenizer: str) -> str:
    """Name of the cache entry for these data options, corpus contents and tokenizer.

    Where the corpora and the model lie does not count, only what stands in them.

    Args:
        recipe: the recipe.
        corpora: from `resolve`.
        contents: content hash of every path in `corpora`.
        tokenizer: from `tokenizer_fingerprint`.
    """
    options = prepared_options(recipe)
    data = {name: value for name, value in options["data"].items() if name != "corpora"}
    described = [
        corpus_options(replace(corpus, paths=()))
        | {"contents": [contents[str(path)] for path in corpus.paths]}
        for corpus in corpora
    ]
    return json_hash([FORMAT, data, described, options["seed"], tokenizer])


def build(
    recipe: Recipe,
    corpora: list[Corpus],
    encoder: Encoder,
    entry: Path,
    digest: str,
    anew: bool = False,
    trained_on: Callable[[], TrainedOn] | None = None,
) -> dict[str, Any]:
    """Fill the cache entry `entry` unless it is there already; returns its manifest.

    Interrupted builds leave nothing, and of two builds of the same entry the first one to end wins.

    Args:
        recipe: the recipe.
        corpora: from `resolve`.
        encoder: tokenises.
        entry: directory to make.
        digest: from `entry_hash`.
        anew: replace what is there.
        trained_on: for a test set that has an entry of its own; called when there is something to do.

    Raises:
        DataError: a corpus is unfit, or a split is empty after filtering.
    """
    if not anew and (manifest := _complete(entry)) is not None:
        return manifest
    entry.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", suffix=".tmp", dir=entry.parent))
    try:
        known = None if trained_on is None else trained_on()
        counts = _Builder(recipe, corpora, encoder, temporary, known).run()
        files = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
        manifest = {
            "format": FORMAT,
            "hash": digest,
            "pairs": list(recipe.data.pairs),
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
        _publish(temporary, entry, anew)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    # Not read again: another process may be replacing the entry by an equal one at this moment.
    return manifest


def _complete(entry: Path) -> dict[str, Any] | None:
    try:
        return read_manifest(entry)
    except ArtefactError:
        return None


def _publish(temporary: Path, entry: Path, anew: bool) -> None:
    # Another process may have built the same entry meanwhile; it has the same content.
    if anew or _complete(entry) is None:
        publish_entry(temporary, entry)


def _statistics(counts: Counts) -> dict[str, Any]:
    values = asdict(counts)
    del values["first_dropped"], values["content"]
    return values


class _Builder:
    def __init__(
        self,
        recipe: Recipe,
        corpora: list[Corpus],
        encoder: Encoder,
        directory: Path,
        trained_on: TrainedOn | None,
    ) -> None:
        self._recipe, self._data = recipe, recipe.data
        self._corpora, self._encoder, self._directory = corpora, encoder, directory
        self._trained_on = trained_on
        self._shots: dict[str, list[tuple[str, str]]] = {}
        self._counts: dict[str, dict[str, Counts]] = {pair: {} for pair in self._data.pairs}

    def run(self) -> dict[str, dict[str, Counts]]:
        bytes_to_read = sum(size_of(corpus) * self._readings(corpus) for corpus in self._corpora)
        with (
            (self._directory / "rejected.jsonl").open("w", encoding="utf-8") as self._rejected,
            progress("prepare (bytes)", bytes_to_read) as self._bar,
        ):
            self._held_out = held_out(self._recipe, self._corpora, self._bar)
            for pair in self._data.pairs:
                self._shots[pair] = self._choose_shots(pair)
                self._prepare_pair(pair)
        return self._counts

    def _readings(self, corpus: Corpus) -> int:
        for_shots = corpus.split == "train" and self._data.prompt.shots > 0
        return 2 if corpus.split in HELD_OUT or for_shots else 1

    def _choose_shots(self, pair: str) -> list[tuple[str, str]]:
        if self._trained_on is not None and not self._of(pair, "train"):
            return self._trained_on.shots.get(pair, [])
        return shots_of(self._recipe, self._corpora, pair, self._held_out, self._bar)

    def _of(self, pair: str, split: Split) -> list[Corpus]:
        return [corpus for corpus in self._corpora if corpus.pair == pair and corpus.split == split]

    def _prepare_pair(self, pair: str) -> None:
        trained_on = None if self._trained_on is None else self._trained_on.sentences
        for split in HELD_OUT:
            if corpora := self._of(pair, split):
                examples = self._examples(pair, split, corpora, Filter(self._data.filters, trained_on))
                self._write(pair, split, examples)
        # Detection and training share one memory of duplicates: nothing that detects is trained on.
        keep = Filter(self._data.filters, self._held_out)
        detect, train = self._of(pair, "detect"), self._of(pair, "train")
        if detect:
            self._write(pair, "detect", self._examples(pair, "detect", detect, keep))
        if train:
            set_aside: list[tuple[Row, Encoded]] = []
            examples = self._examples(pair, "train", train, keep)
            if not detect and self._data.detect_examples > 0:
                examples = self._without_detection(pair, examples, set_aside)
            self._write(pair, "train", examples)
            if set_aside:
                self._counts[pair]["detect"] = Counts(read=len(set_aside))
                self._write(pair, "detect", set_aside)

    def _examples(
        self, pair: str, split: Split, corpora: list[Corpus], keep: Filter
    ) -> Iterator[tuple[Row, Encoded]]:
        counts = self._counts[pair].setdefault(split, Counts())
        rows = (row for corpus in corpora for row in self._kept_rows(corpus, keep, counts))
        for row, encoded in self._encoder.encode(pair, rows, self._data.prompt, self._shots[pair]):
            if len(encoded[0]) > self._data.max_length:
                text = f"{len(encoded[0])} tokens: {row.src} | {row.tgt}"
                self._reject(pair, split, counts, Rejection(row.file, row.line, "too_many_tokens", text))
            else:
                yield row, encoded

    def _kept_rows(self, corpus: Corpus, keep: Filter, counts: Counts) -> Iterator[Row]:
        kept = 0
        for item in reading(corpus, self._bar):
            counts.read += 1
            if isinstance(item, Rejection):
                self._reject(corpus.pair, corpus.split, counts, item)
            elif reason := keep.reason(item):
                rejection = Rejection(item.file, item.line, reason, f"{item.src} | {item.tgt}")
                self._reject(corpus.pair, corpus.split, counts, rejection)
            else:
                yield item
                kept += 1
                if kept == corpus.limit:
                    return

    def _reject(self, pair: str, split: str, counts: Counts, rejection: Rejection) -> None:
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

    def _without_detection(
        self, pair: str, examples: Iterable[tuple[Row, Encoded]], set_aside: list[tuple[Row, Encoded]]
    ) -> Iterator[tuple[Row, Encoded]]:
        # A heap holds the examples with the smallest seeded hashes so far; what falls out of it is trained on.
        heap: list[tuple[int, int, tuple[Row, Encoded]]] = []
        for number, example in enumerate(examples):
            row = example[0]
            key = -seeded_hash(self._recipe.data_seed, f"detect:{pair}", row.src, row.tgt)
            if len(heap) < self._data.detect_examples:
                heapq.heappush(heap, (key, -number, example))
            else:
                yield heapq.heappushpop(heap, (key, -number, example))[2]
        set_aside += [example for _, _, example in sorted(heap, key=lambda item: -item[1])]
        self._counts[pair]["train"].moved_to_detect = len(set_aside)

    def _write(self, pair: str, split: Split, examples: Iterable[tuple[Row, Encoded]]) -> None:
        path, content = self._directory / split_file(pair, split), hashlib.sha256()
        with ArrowWriter(path=str(path), features=FEATURES) as writer:
            counts = self._counts[pair].setdefault(split, Counts())
            for row, (ids, prompt_length) in examples:
                writer.write(
                    {
                        "id": f"{pair}:{split}:{counts.kept}",
                        "src": row.src,
                        "tgt": row.tgt,
                        "input_ids": ids,
                        "prompt_length": prompt_length,
                        "length": len(ids),
                    }
                )
                content.update(json.dumps([row.src, row.tgt, ids, prompt_length]).encode())
                counts.kept += 1
                counts.tokens += len(ids)
                counts.target_tokens += len(ids) - prompt_length
            if counts.kept == 0:
                raise self._empty(pair, split, counts)
            writer.finalize()
            counts.content = content.hexdigest()

    def _empty(self, pair: str, split: Split, counts: Counts) -> DataError:
        if counts.moved_to_detect:
            return DataError(
                f"train of {pair}: all {counts.moved_to_detect} examples that pass the filters were set "
                "aside for detection: lower data.detect_examples, add training data, or give a corpus with "
                "split: detect"
            )
        key = " and ".join(corpus.key for corpus in self._of(pair, split))
        dropped = ", ".join(f"{reason} {count}" for reason, count in counts.dropped.items()) or "nothing"
        first = "; ".join(counts.first_dropped)
        return DataError(
            f"{split} of {pair}: nothing is left of {counts.read} lines (dropped: {dropped}; {first}): relax "
            f"data.filters or data.max_length, or correct {key}"
        )
