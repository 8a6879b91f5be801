"""`lander tokenizer`."""

from __future__ import annotations

import argparse

from lander_ds.data.tokens.sentencepiece_training import train_tokenizer
from lander_ds.preflight.recipe import load_checked


def run(arguments: argparse.Namespace) -> None:
    """Train a tokenizer on the corpora of a recipe."""
    recipe = load_checked(arguments.recipe, arguments.overrides, "tokenizer")
    train_tokenizer(
        recipe, arguments.out, arguments.vocab_size, arguments.model_type, arguments.character_coverage
    )
