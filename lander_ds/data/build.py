"""Building prepared data: corpora to filtered, tokenised Arrow files, streaming, named by content."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lander_ds.common.files import json_hash
from lander_ds.config.recipe import Recipe
from lander_ds.config.schema.types import Split
from lander_ds.data.entry import Counts, EntryWriter, fill_entry, too_many_tokens
from lander_ds.data.filters import Filter, Sentences
from lander_ds.data.passes import HELD_OUT, held_out, shots_of, size_of
from lander_ds.data.prepared import FORMAT, corpus_options, prepared_options
from lander_ds.data.quality import JUDGED, Judge
from lander_ds.data.sources.corpus import Corpus
from lander_ds.data.sources.rows import Row
from lander_ds.data.tokens.encoding import Encoded, Encoder
from lander_ds.data.tokens.prompt import seeded_hash


@dataclass(frozen=True)
class TrainedOn:
    """What a test set that has an entry of its own needs to know of the training data."""

    sentences: Sentences
    """Of which the set must have none."""
    shots: Mapping[str, list[tuple[str, str]]]
    """Pair -> the examples that stand in every prompt (`data.prompt.shots`)."""


def entry_hash(
    recipe: Recipe,
    corpora: list[Corpus],
    contents: Mapping[str, str],
    tokenizer: str,
    metrics: Mapping[str, str] | None = None,
) -> str:
    """Name of the cache entry for these data options, corpus contents and tokenizer.

    Where the corpora and the model lie does not count, only what stands in them.

    Args:
        recipe: the recipe.
        corpora: from `resolve`.
        contents: content hash of every path in `corpora`.
        tokenizer: from `tokenizer_fingerprint`.
        metrics: name -> identity, of those in `data.filters.quality`.
    """
    options = prepared_options(recipe)
    data = {name: value for name, value in options["data"].items() if name != "corpora"}
    parts = [FORMAT, data, described(corpora, contents), options["seed"], tokenizer]
    return json_hash([*parts, dict(metrics)] if metrics else parts)


def described(corpora: list[Corpus], contents: Mapping[str, str]) -> list[dict[str, Any]]:
    """Corpora by what stands in them, as JSON values."""
    return [
        corpus_options(replace(corpus, paths=()))
        | {"contents": [contents[str(path)] for path in corpus.paths]}
        for corpus in corpora
    ]


def build(
    recipe: Recipe,
    corpora: list[Corpus],
    encoder: Encoder,
    entry: Path,
    digest: str,
    anew: bool = False,
    trained_on: Callable[[], TrainedOn] | None = None,
    judges: Sequence[Judge] = (),
) -> dict[str, Any]:
    """Fill the cache entry `entry` unless it is there already; returns its manifest (see `fill_entry`).

    Args:
        recipe: the recipe.
        corpora: from `resolve`.
        encoder: tokenises.
        entry: directory to make.
        digest: from `entry_hash`.
        anew: replace what is there.
        trained_on: for a test set that has an entry of its own; called when there is something to do.
        judges: of `data.filters.quality`.

    Raises:
        DataError: a corpus is unfit, or a split is empty after filtering.
    """

    def fill(directory: Path) -> Mapping[str, Mapping[str, Counts]]:
        known = None if trained_on is None else trained_on()
        read = sum(size_of(corpus) * _readings(recipe, corpus) for corpus in corpora)
        with EntryWriter(directory, recipe.data.pairs, read, recipe.data.prompt.context) as writer:
            _Builder(recipe, corpora, encoder, writer, known, judges).run()
        return writer.counts

    return fill_entry(entry, digest, fill, anew)


def _readings(recipe: Recipe, corpus: Corpus) -> int:
    for_shots = corpus.split == "train" and recipe.data.prompt.shots > 0
    return 2 if corpus.split in HELD_OUT or for_shots else 1


class _Builder:
    def __init__(
        self,
        recipe: Recipe,
        corpora: list[Corpus],
        encoder: Encoder,
        writer: EntryWriter,
        trained_on: TrainedOn | None,
        judges: Sequence[Judge],
    ) -> None:
        self._recipe, self._data = recipe, recipe.data
        self._corpora, self._encoder, self._writer = corpora, encoder, writer
        self._trained_on, self._judges = trained_on, judges
        self._shots: dict[str, list[tuple[str, str]]] = {}

    def run(self) -> None:
        self._held_out = held_out(self._recipe, self._corpora, self._writer.bar)
        for pair in self._data.pairs:
            self._shots[pair] = self._choose_shots(pair)
            self._prepare_pair(pair)

    def _choose_shots(self, pair: str) -> list[tuple[str, str]]:
        if self._trained_on is not None and not self._of(pair, "train"):
            return self._trained_on.shots.get(pair, [])
        return shots_of(self._recipe, self._corpora, pair, self._held_out, self._writer.bar)

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
                self._writer.of(pair, "detect").read = len(set_aside)
                self._write(pair, "detect", set_aside)

    def _examples(
        self, pair: str, split: Split, corpora: list[Corpus], keep: Filter
    ) -> Iterator[tuple[Row, Encoded]]:
        judges = self._judges if split in JUDGED else ()
        rows = (row for corpus in corpora for row in self._writer.kept_rows(corpus, keep, keep.apart, judges))
        for row, encoded in self._encoder.encode(pair, rows, self._data.prompt, self._shots[pair]):
            if encoded.longest > self._data.max_length:
                self._writer.reject(pair, split, too_many_tokens(row, encoded.longest))
            else:
                yield row, encoded

    def _write(self, pair: str, split: Split, examples: Iterable[tuple[Row, Encoded]]) -> None:
        self._writer.write(pair, split, examples, self._of(pair, split))

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
        self._writer.of(pair, "train").moved_to_detect = len(set_aside)
