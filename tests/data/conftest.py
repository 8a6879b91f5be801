"""Corpora, recipes and a tokenizer to test the data room with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from support.data_helpers import SAMPLE, MakeRecipe

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

from lander_ds.config.recipe import ModelConfig, Recipe
from lander_ds.config.schema.data import CorpusConfig, DataConfig
from lander_ds.data.tokens.sentencepiece_training import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SentencePiece tokenizer, trained on the sample corpora by the product."""
    root = tmp_path_factory.mktemp("tokenizer")
    corpora = (CorpusConfig(str(SAMPLE / "train.{pair}.jsonl"), limit=300),)
    recipe = Recipe(str(root), ModelConfig(str(root)), DataConfig(("en-de", "en-ru"), corpora), "none")
    train_tokenizer(recipe, root / "model", 1500)
    return root / "model"


@pytest.fixture
def make_recipe(tmp_path: Path, tokenizer_dir: Path) -> MakeRecipe:
    """Builds a recipe from corpora and data options; its run directory is fresh."""

    def make(
        *corpora: CorpusConfig, pairs: tuple[str, ...] = ("en-de",), seed: int = 1, **data: Any
    ) -> Recipe:
        return Recipe(
            run_dir=str(tmp_path / "run"),
            model=ModelConfig(str(tokenizer_dir)),
            data=DataConfig(pairs=pairs, corpora=corpora, **data),
            deepspeed="none",
            seed=seed,
        )

    return make
