"""Passes over corpora before the one that writes: sentences that are kept apart, and examples for prompts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from lander_ds.common.console import ProgressTask
from lander_ds.common.errors import DataError
from lander_ds.config.recipe import Recipe
from lander_ds.config.schema.types import Split
from lander_ds.data.filters import Filter, Sentences
from lander_ds.data.sources.corpus import Corpus
from lander_ds.data.sources.readers import read
from lander_ds.data.sources.rows import Rejection, Row
from lander_ds.data.tokens.prompt import choose_shots

HELD_OUT: tuple[Split, ...] = ("test", "valid")
"""Splits whose sentences must not be trained on."""


def held_out(recipe: Recipe, corpora: Sequence[Corpus], bar: ProgressTask) -> Sentences:
    """The sentences of valid and test."""
    sentences = Sentences(recipe.data.filters)
    for corpus in corpora:
        if corpus.split in HELD_OUT:
            for item in reading(corpus, bar):
                if isinstance(item, Row):
                    sentences.add(item.src, item.tgt)
    return sentences


def shots_of(
    recipe: Recipe, corpora: Sequence[Corpus], pair: str, apart: Sentences, bar: ProgressTask
) -> list[tuple[str, str]]:
    """The examples that stand in every prompt of a pair, and one to spare: a prompt never shows its own.

    Args:
        recipe: `data.prompt.shots` says how many.
        corpora: of which those with training data of the pair are read.
        pair: translation direction.
        apart: sentences that are no examples.
        bar: is advanced by the bytes that are read.

    Raises:
        DataError: there are too few.
    """
    count = recipe.data.prompt.shots + 1 if recipe.data.prompt.shots else 0
    if count == 0:
        return []
    keep = Filter(recipe.data.filters, apart)
    usable = (
        (item.src, item.tgt)
        for corpus in corpora
        if corpus.pair == pair and corpus.split == "train"
        for item in reading(corpus, bar)
        if isinstance(item, Row) and keep.reason(item) is None
    )
    shots = choose_shots(usable, count, recipe.data_seed, pair)
    if len(shots) < count:
        raise DataError(
            f"data.prompt.shots: {recipe.data.prompt.shots} examples of {pair} are wanted, and its "
            f"training split has {len(shots)} usable ones (one more is needed): lower it, or add "
            "training data"
        )
    return shots


def reading(corpus: Corpus, bar: ProgressTask) -> Iterator[Row | Rejection]:
    """The items of a corpus; the bar ends where the corpus does even when only its beginning is wanted."""
    left = size_of(corpus)

    def advance(count: int) -> None:
        nonlocal left
        left -= count
        bar.advance(count, note=corpus.paths[0].name)

    try:
        yield from read(corpus, advance)
    finally:
        if left:
            bar.advance(left)


def size_of(corpus: Corpus) -> int:
    """Bytes of its files."""
    files = [file for path in corpus.paths for file in (path.rglob("*") if path.is_dir() else [path])]
    return sum(os.path.getsize(file) for file in files if file.is_file())
