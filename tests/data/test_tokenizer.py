"""Tokenizers: SentencePiece models, training them, and how examples are encoded."""

from __future__ import annotations

import json
import os
import shutil
from itertools import product
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.data_helpers import SAMPLE, STYLES, MakeRecipe, make_sentencepiece, sample_sentences
from transformers import AutoTokenizer

from lander_ds.common.errors import ConfigError, DataError
from lander_ds.config.schema.data import CorpusConfig
from lander_ds.data.tokens.sentencepiece_training import train_tokenizer
from lander_ds.data.tokens.tokenizer import (
    load_tokenizer,
    tokenizer_fingerprint,
)

ODD = [
    "Hello  world",
    " leading",
    "trailing ",
    "",
    "   ",
    "a\nb\tc",
    "日本語 🎉",
    "e\u0301",
    "１２ ﬁ",
    "a\u00a0b",
]


@pytest.mark.parametrize(
    ("style", "kind", "byte_fallback"), list(product(STYLES, ["unigram", "bpe"], [True, False]))
)
def test_bare_tokenizer_model_has_the_ids_of_sentencepiece(
    tmp_path: Path, style: str, kind: str, byte_fallback: bool
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 1200}')
    make_sentencepiece(tmp_path, style, kind, byte_fallback)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = load_tokenizer(str(tmp_path), trust_remote_code=False)
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in [*sample_sentences(400)[500:], *ODD]:
        ids = reference.encode(text)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids, text
        assert tokenizer(text)["input_ids"] == [reference.bos_id(), *ids]
        assert saved(text)["input_ids"] == [reference.bos_id(), *ids]
        if byte_fallback:
            assert tokenizer.decode(ids) == reference.decode(ids)


def test_tokenizer_config_beside_a_bare_model_counts(tmp_path: Path, tokenizer_dir: Path) -> None:
    shutil.copy(tokenizer_dir / "tokenizer.model", tmp_path)
    settings = {
        "add_bos_token": False,
        "eos_token": {"content": "<|end|>"},
        "added_tokens_decoder": {"1500": {"content": "<|end|>", "special": True}},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(str(tmp_path), trust_remote_code=False)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (1500, 0)
    assert tokenizer("a<|end|>")["input_ids"][-1] == 1500
    assert tokenizer.bos_token_id not in tokenizer("a")["input_ids"]


class TestTraining:
    def test_special_ids_are_fixed_and_every_text_comes_back(self, tokenizer_dir: Path) -> None:
        tokenizer = load_tokenizer(str(tokenizer_dir), trust_remote_code=False)
        names = (
            tokenizer.pad_token_id,
            tokenizer.eos_token_id,
            tokenizer.bos_token_id,
            tokenizer.unk_token_id,
        )
        assert (*names, len(tokenizer)) == (0, 1, 2, 3, 1500)

        @settings(max_examples=200)
        @given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")))
        def comes_back(text: str) -> None:
            # The spelling of the unknown piece is that piece.
            assume("<unk>" not in text)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert all(index > 3 for index in ids)
            assert tokenizer.decode(ids) == text

        comes_back()

    def test_ids_are_those_of_sentencepiece_and_autotokenizer(
        self, tokenizer_dir: Path, tmp_path: Path
    ) -> None:
        reference = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_dir / "tokenizer.model"))
        shutil.copy(tokenizer_dir / "tokenizer.model", tmp_path)
        tokenizers = [
            load_tokenizer(str(tokenizer_dir), trust_remote_code=False),
            load_tokenizer(str(tmp_path), trust_remote_code=False),
            AutoTokenizer.from_pretrained(tokenizer_dir),
        ]
        for text in [*sample_sentences(50), *ODD]:
            assert [t(text)["input_ids"] for t in tokenizers] == [[2, *reference.encode(text)]] * 3
        assert len({tokenizer_fingerprint(tokenizer) for tokenizer in tokenizers}) == 1

    def test_bpe_and_determinism(self, make_recipe: MakeRecipe, tmp_path: Path) -> None:
        recipe = make_recipe(CorpusConfig(str(SAMPLE / "train.{pair}.jsonl"), limit=150))
        for name in ("one", "two"):
            train_tokenizer(recipe, tmp_path / name, 700, model_type="bpe", character_coverage=1.0)
        files = sorted(os.listdir(tmp_path / "one"))
        assert files == ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
        assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)
        assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]

    @pytest.mark.parametrize(
        ("vocabulary", "message"),
        [
            (100_000, r"too small for 100000 pieces: use a vocabulary of at most \d+"),
            (310, r"310 pieces are fewer than the \d+ that the characters"),
        ],
    )
    def test_vocabulary_that_does_not_fit(
        self, make_recipe: MakeRecipe, tmp_path: Path, vocabulary: int, message: str
    ) -> None:
        recipe = make_recipe(CorpusConfig(str(SAMPLE / "train.{pair}.jsonl"), limit=150))
        with pytest.raises(DataError, match=message):
            train_tokenizer(recipe, tmp_path / "out", vocabulary)
        assert not (tmp_path / "out").exists()

    def test_refusals(self, make_recipe: MakeRecipe, tmp_path: Path, tokenizer_dir: Path) -> None:
        recipe = make_recipe(CorpusConfig(str(SAMPLE / "train.{pair}.jsonl"), limit=50))
        with pytest.raises(ConfigError, match=r"already holds tokenizer\.json"):
            train_tokenizer(recipe, tokenizer_dir, 1000)
        with pytest.raises(ConfigError, match="vocabulary of 100 is too small"):
            train_tokenizer(recipe, tmp_path / "out", 100)
        with pytest.raises(ConfigError, match=r"character coverage 0\.1"):
            train_tokenizer(recipe, tmp_path / "out", 1000, character_coverage=0.1)
        only_test = make_recipe(CorpusConfig(str(SAMPLE / "test.{pair}.jsonl"), split="test"))
        with pytest.raises(DataError, match="no corpus has split: train"):
            train_tokenizer(only_test, tmp_path / "out", 1000)

    def test_an_unfit_corpus_is_reported_as_such(self, make_recipe: MakeRecipe, tmp_path: Path) -> None:
        (tmp_path / "c.en").write_text("a\nb\n")
        (tmp_path / "c.de").write_text("a\n")
        with pytest.raises(DataError, match=r"c\.en has 2 lines, but .*c\.de has 1"):
            train_tokenizer(make_recipe(CorpusConfig(str(tmp_path / "c"))), tmp_path / "out", 1000)


class TestFingerprint:
    def test_fingerprint_sees_only_what_changes_ids(self, tokenizer_dir: Path) -> None:
        tokenizer = load_tokenizer(str(tokenizer_dir), trust_remote_code=False)
        before = tokenizer_fingerprint(tokenizer)
        tokenizer(["a", "b c"], padding=True, truncation=True, max_length=7)
        assert tokenizer_fingerprint(tokenizer) == before
        tokenizer.add_tokens(["<new>"])
        assert tokenizer_fingerprint(tokenizer) != before
