"""Named test sets (`evaluate.sets`): what preparing one needs besides its own corpora."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lander_ds.common.console import progress
from lander_ds.config.data_consistency import set_pairs
from lander_ds.config.recipe import Recipe
from lander_ds.config.schema.types import Split
from lander_ds.data.build import TrainedOn
from lander_ds.data.filters import Sentences
from lander_ds.data.passes import HELD_OUT, held_out, shots_of, size_of
from lander_ds.data.prepared import PreparedData
from lander_ds.data.sources.corpus import Corpus

TRAINED: tuple[Split, ...] = ("train", "detect")
"""Splits whose sentences say nothing in a test."""


def set_recipe(recipe: Recipe, name: str) -> Recipe:
    """The recipe with the directions of a test set in place of its own; its data is not divided further."""
    return replace(recipe, data=replace(recipe.data, pairs=set_pairs(recipe, name), detect_examples=0))


def what_was_trained_on(recipe: Recipe, corpora: Sequence[Corpus], data: PreparedData) -> TrainedOn:
    """What keeps test sets apart from the training data, which stay as they are.

    Args:
        recipe: the recipe.
        corpora: of `data.corpora`.
        data: what was made of them.

    Raises:
        DataError: there are too few examples for the prompts.
    """
    sentences = Sentences(recipe.data.filters, "training_overlap_exact", "training_overlap_normalised")
    for name in TRAINED:
        for split in data.split(name).values():
            sentences.add(*split.texts())
    return TrainedOn(sentences, training_shots(recipe, corpora))


def training_shots(recipe: Recipe, corpora: Sequence[Corpus]) -> dict[str, list[tuple[str, str]]]:
    """Pair -> the examples that stand in every prompt of the training, and one to spare.

    Raises:
        DataError: there are too few.
    """
    if not recipe.data.prompt.shots:
        return {}
    read = [corpus for corpus in corpora if corpus.split in (*HELD_OUT, "train")]
    with progress("examples of the prompts (bytes)", sum(map(size_of, read))) as bar:
        apart = held_out(recipe, corpora, bar)
        return {pair: shots_of(recipe, corpora, pair, apart, bar) for pair in recipe.data.pairs}
