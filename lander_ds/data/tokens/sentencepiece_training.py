"""Training a SentencePiece tokenizer on a recipe's training corpora."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import sentencepiece

from lander_ds.common.console import ProgressTask, progress
from lander_ds.common.errors import ConfigError, DataError, LanderError
from lander_ds.config.recipe import Recipe
from lander_ds.data.filters import Filter, check_filters
from lander_ds.data.sources.corpus import Corpus, resolve
from lander_ds.data.sources.readers import read
from lander_ds.data.sources.rows import Row
from lander_ds.data.tokens.tokenizer import TOKENIZER_FILES, load_tokenizer

logger = logging.getLogger(__name__)

SPECIAL_PIECES: dict[str, Any] = {
    **{"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3},
    **{"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>", "unk_piece": "<unk>"},
}

# SentencePiece holds what it trains on in memory; a sample of this many sentences serves any vocabulary.
SAMPLED_SENTENCES = 2_000_000


def train_tokenizer(
    recipe: Recipe,
    out: Path,
    vocab_size: int,
    model_type: Literal["unigram", "bpe"] = "unigram",
    character_coverage: float = 0.9995,
) -> None:
    """Train a SentencePiece model on both sides of the training corpora and write a tokenizer directory.

    `out` receives `tokenizer.model` and, with the same ids, `tokenizer.json` and `tokenizer_config.json`.
    Special ids are fixed: padding 0, end 1, beginning 2, unknown 3. White space is kept as it is and
    unknown characters become bytes, so every text comes back from its ids unchanged.

    Args:
        recipe: only its data section and seed are used.
        out: directory; made when missing, must not hold a tokenizer.
        vocab_size: number of pieces, the 4 special and 256 byte pieces included.
        model_type: SentencePiece algorithm.
        character_coverage: share of the characters in the corpora that get pieces of their own.

    Raises:
        ConfigError: an option is impossible, or `out` holds a tokenizer already.
        DataError: the corpora are unfit, or too small or too varied for the vocabulary.
    """
    _check(out, vocab_size, model_type, character_coverage)
    check_filters(recipe.data.filters)
    corpora = [corpus for corpus in resolve(recipe.data) if corpus.split == "train"]
    if not corpora:
        raise DataError(
            "data.corpora: no corpus has split: train, so there is nothing to train a tokenizer on: add one"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent) as temporary:
        directory = Path(temporary)
        _train(recipe, corpora, directory / "tokenizer.model", vocab_size, model_type, character_coverage)
        load_tokenizer(temporary, trust_remote_code=False).save_pretrained(temporary)
        out.mkdir(exist_ok=True)
        for file in sorted(directory.iterdir()):
            file.replace(out / file.name)
    logger.info("tokenizer: %d pieces (%s) in %s", vocab_size, model_type, out)


def _check(out: Path, vocab_size: int, model_type: str, character_coverage: float) -> None:
    if model_type not in {"unigram", "bpe"}:
        raise ConfigError(f"tokenizer: model type {model_type!r} is unknown: use unigram or bpe")
    if vocab_size < 300:
        raise ConfigError(
            f"tokenizer: a vocabulary of {vocab_size} is too small (4 special and 256 byte pieces are in "
            "it): use 1000 or more"
        )
    if not 0.9 <= character_coverage <= 1:
        raise ConfigError(
            f"tokenizer: character coverage {character_coverage} is not between 0.9 and 1: use 0.9995"
        )
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: is a file: give a directory for the tokenizer")
    if present := [name for name in TOKENIZER_FILES if (out / name).exists()]:
        raise ConfigError(
            f"{out}: already holds {present[0]}: give another directory, or delete the tokenizer there"
        )


def _train(
    recipe: Recipe,
    corpora: list[Corpus],
    target: Path,
    vocab_size: int,
    model_type: str,
    character_coverage: float,
) -> None:
    sentences = _Sentences(recipe, corpora)
    sentencepiece.set_random_generator_seed(recipe.seed % 2**32)
    total = sum(os.path.getsize(path) for corpus in corpora for path in corpus.paths if path.is_file())
    logger.info("tokenizer: training %d %s pieces", vocab_size, model_type)
    try:
        with progress("tokenizer (bytes)", total) as bar, target.open("wb") as model:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=sentences.stream(bar),
                model_writer=model,
                vocab_size=vocab_size,
                model_type=model_type,
                character_coverage=character_coverage,
                input_sentence_size=SAMPLED_SENTENCES,
                shuffle_input_sentence=True,
                max_sentence_length=4 * recipe.data.filters.max_chars,
                byte_fallback=True,
                split_digits=True,
                allow_whitespace_only_pieces=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                minloglevel=2,
                **SPECIAL_PIECES,
            )
    except (RuntimeError, OSError) as error:
        if sentences.error is not None:
            raise sentences.error from None
        raise _explain(error, vocab_size) from None
    if sentences.error is not None:
        raise sentences.error


def _explain(error: Exception, vocab_size: int) -> LanderError:
    text = str(error)
    if highest := re.search(r"<= (\d+)", text):
        return DataError(
            f"tokenizer: the corpora are too small for {vocab_size} pieces: use a vocabulary of at most "
            f"{highest[1]}, or add training data"
        )
    if needed := re.search(r"required_chars[^\d]*\d+ vs (\d+)", text):
        return DataError(
            f"tokenizer: {vocab_size} pieces are fewer than the {needed[1]} that the characters of the "
            "corpora need: raise the vocabulary, or lower the character coverage"
        )
    return DataError(
        f"tokenizer: SentencePiece cannot train on these corpora ({text.splitlines()[-1][:300]})"
    )


class _Sentences:
    """The sentences of both sides. Keeps an error of the corpora, which SentencePiece would hide."""

    def __init__(self, recipe: Recipe, corpora: list[Corpus]) -> None:
        self._recipe, self._corpora = recipe, corpora
        self.error: LanderError | None = None

    def stream(self, bar: ProgressTask) -> Iterator[str]:
        try:
            for pair in self._recipe.data.pairs:
                keep = Filter(self._recipe.data.filters, None)
                for corpus in self._corpora:
                    if corpus.pair == pair:
                        yield from self._of(corpus, keep, bar)
        except LanderError as error:
            self.error = error

    def _of(self, corpus: Corpus, keep: Filter, bar: ProgressTask) -> Iterator[str]:
        kept = 0
        for item in read(corpus, bar.advance):
            if isinstance(item, Row) and keep.reason(item) is None:
                yield item.src
                yield item.tgt
                kept += 1
                if kept == corpus.limit:
                    return
