"""Texts without a pair (`data.replay`) as prepared data: an entry of its own, with one split, `train` of `TEXT`.

A text is the target of an empty prompt, the answer of an instruction the target of the instruction. What they are
mixed into and in which share is not known here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lander_ds.common.files import json_hash
from lander_ds.config.recipe import Recipe
from lander_ds.config.schema.data import PromptConfig
from lander_ds.data.build import described
from lander_ds.data.entry import Counts, EntryWriter, fill_entry, too_many_tokens
from lander_ds.data.filters import TextFilter
from lander_ds.data.passes import HELD_OUT, held_out, size_of
from lander_ds.data.prepared import FORMAT, replay_options
from lander_ds.data.sources.corpus import TEXT, Corpus, resolve_set
from lander_ds.data.sources.rows import Row
from lander_ds.data.tokens.encoding import Encoded, Encoder

PLAIN = PromptConfig(template="{src}", target_prefix="")
"""What stands before a text: nothing."""


def instruction(prompt: PromptConfig) -> PromptConfig:
    """How instructions are asked: as the chat template has it, or on the lines before the answer."""
    if prompt.chat:
        return replace(prompt, user="{src}", system="", shots=0, context=0)
    return PromptConfig(template="{src}", target_prefix="\n")


def kept_apart(recipe: Recipe, corpora: Sequence[Corpus]) -> list[Corpus]:
    """Everything that is translated or validated on: of `corpora`, and of all named test sets."""
    of_sets = [corpus for name in recipe.evaluate.sets for corpus in resolve_set(recipe, name)]
    return [corpus for corpus in (*corpora, *of_sets) if corpus.split in HELD_OUT]


def replay_hash(
    recipe: Recipe, texts: list[Corpus], apart: list[Corpus], contents: Mapping[str, str], tokenizer: str
) -> str:
    """Name of the cache entry.

    Args:
        recipe: the recipe.
        texts: from `resolve_replay`.
        apart: from `kept_apart`.
        contents: content hash of every path in both.
        tokenizer: from `tokenizer_fingerprint`.
    """
    options = {name: value for name, value in replay_options(recipe).items() if name != "corpora"}
    return json_hash([FORMAT, options, described(texts, contents), described(apart, contents), tokenizer])


def build_replay(
    recipe: Recipe,
    texts: list[Corpus],
    apart: list[Corpus],
    encoder: Encoder,
    entry: Path,
    digest: str,
    anew: bool = False,
) -> dict[str, Any]:
    """Fill the cache entry `entry` unless it is there already; returns its manifest (see `fill_entry`).

    Args:
        recipe: the recipe.
        texts: from `resolve_replay`.
        apart: from `kept_apart`.
        encoder: tokenises.
        entry: directory to make.
        digest: from `replay_hash`.
        anew: replace what is there.

    Raises:
        DataError: a corpus is unfit, or nothing is left after filtering.
    """

    def fill(directory: Path) -> Mapping[str, Mapping[str, Counts]]:
        read = sum(map(size_of, (*texts, *apart)))
        with EntryWriter(directory, [TEXT], read) as writer:
            keep = TextFilter(recipe.data.filters, held_out(recipe, apart, writer.bar))
            examples = (
                example for corpus in texts for example in _examples(recipe, corpus, encoder, writer, keep)
            )
            writer.write(TEXT, "train", examples, texts)
        return writer.counts

    return fill_entry(entry, digest, fill, anew)


def _examples(
    recipe: Recipe, corpus: Corpus, encoder: Encoder, writer: EntryWriter, keep: TextFilter
) -> Iterator[tuple[Row, Encoded]]:
    asked, longest = bool(corpus.columns.src), recipe.data.max_length
    prompt = instruction(recipe.data.prompt) if asked else PLAIN
    # Neither prompt names a language.
    pair = recipe.data.pairs[0]
    for row, encoded in encoder.encode(pair, writer.kept_rows(corpus, keep), prompt, ()):
        ids, prompt_length, _ = encoded
        if len(ids) <= longest:
            yield row, encoded
        elif asked:
            writer.reject(TEXT, "train", too_many_tokens(row, len(ids)))
        else:
            opening, room = ids[:prompt_length], longest - prompt_length
            for begin in range(prompt_length, len(ids), room):
                yield row, Encoded([*opening, *ids[begin : begin + room]], prompt_length)
