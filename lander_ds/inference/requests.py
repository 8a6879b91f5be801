"""What every system is asked to translate: the sentences of a split and the prompts it continues."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from lander_ds.common.errors import ConfigError, DataError
from lander_ds.config.data_consistency import has_examples, translated_pairs
from lander_ds.config.recipe import Recipe
from lander_ds.config.schema.types import System
from lander_ds.config.systems import shows_examples
from lander_ds.data.prepared import NamedSet, PreparedData, PreparedSplit, Sentence
from lander_ds.data.tokens.prompt import choose_shots, shots_for
from lander_ds.data.tokens.prompt_format import prompt_format
from lander_ds.data.tokens.text_encoder import TextEncoder
from lander_ds.inference.translate import Request
from lander_ds.models.loading import model_positions

logger = logging.getLogger(__name__)

MAX_SHOT_CANDIDATES = 20_000
"""Training sentences per pair that few-shot examples are chosen from; reading more would only take time."""


def requests_for(
    system: System, recipe: Recipe, data: PreparedData, tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[Request]]:
    """The requests of a system: translated pair -> sentences in corpus order, at most `translate.limit` of them.

    Prompts are those of the training format, with `translate.shots` examples in front for the systems that show them.

    Raises:
        ConfigError: a prompt and its translation may need more positions than the model has.
        DataError: a pair has no such split, or no training split to take few-shot examples from.
        ModelError: config.json cannot be used.
    """
    config = recipe.translate
    splits, pairs = data.split(config.split), translated_pairs(recipe)
    for pair in pairs:
        if pair not in splits or len(splits[pair]) == 0:
            raise DataError(
                f"translate.split: {pair} has no sentence in split {config.split}: add a corpus with "
                f"`split: {config.split}` to data.corpora, or translate another split"
            )
    train = data.split("train")
    requests = {pair: _of_split(system, recipe, splits[pair], train.get(pair), tokenizer) for pair in pairs}
    _check_positions(system, recipe, requests)
    return requests


def requests_for_set(
    system: System,
    recipe: Recipe,
    data: PreparedData,
    test_set: NamedSet,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, list[Request]]:
    """Like `requests_for`, of a named test set. Directions for which there are no few-shot examples are left out by
    systems that show them, and a log line says so.

    Raises:
        ConfigError: a prompt and its translation may need more positions than the model has.
        DataError: a pair of `data.pairs` has no training split to take few-shot examples from.
        ModelError: config.json cannot be used.
    """
    splits = test_set.data.split(test_set.split)
    train = {**test_set.data.split("train"), **data.split("train")}
    requests = {}
    for pair in test_set.pairs:
        if shows_examples(system) and not has_examples(recipe, pair):
            logger.info(
                "translate %s %s: %s is left out: no corpus of evaluate.shots has examples of it",
                *(system, test_set.name, pair),
            )
        else:
            requests[pair] = _of_split(system, recipe, splits[pair], train.get(pair), tokenizer)
    _check_positions(system, recipe, requests)
    return requests


def _of_split(
    system: System,
    recipe: Recipe,
    split: PreparedSplit,
    train: PreparedSplit | None,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Request]:
    """The requests of one pair; `train`: where few-shot examples come from."""
    config, pair = recipe.translate, split.pair
    indices = range(len(split) if config.limit is None else min(config.limit, len(split)))
    sentences = [split.sentence(index) for index in indices]
    if shows_examples(system):
        prompts = _fewshot_prompts(recipe, train, pair, sentences, tokenizer)
    else:
        prompts = [_own_prompt(split, index) for index in indices]
    shots = config.shots if shows_examples(system) else recipe.data.prompt.shots
    stop = prompt_format(recipe.data.prompt, tokenizer).stop(pair, shots)
    return [
        Request(sentence.id, sentence.src, sentence.tgt, tuple(prompt), stop, sentence.doc)
        for sentence, prompt in zip(sentences, prompts, strict=True)
    ]


def _check_positions(system: System, recipe: Recipe, requests: Mapping[str, Sequence[Request]]) -> None:
    """Learned positions end in an IndexError deep in the model, rotary ones in bad translations."""
    positions = model_positions(recipe.model)
    # Where the recipe does not say how long translations may be, they take what is left.
    new, shots = recipe.translate.max_new_tokens or 1, recipe.translate.shots
    for pair, of_pair in requests.items():
        longest = max(of_pair, key=lambda request: len(request.prompt))
        # The last new token is not read again.
        needed = len(longest.prompt) + new - 1
        if positions is not None and needed > positions:
            what, cure = (
                (f"translate.shots: with {shots} examples", "lower it")
                if shows_examples(system)
                else ("translate.max_new_tokens:", "lower it, or data.max_length")
            )
            raise ConfigError(
                f"{what} the longest prompt of {pair} ({longest.id}) has {len(longest.prompt)} tokens, and with "
                f"translate.max_new_tokens {new} it needs {needed} of the model's {positions} positions: {cure}"
            )


def fewshot_examples(train: PreparedSplit, count: int, seed: int) -> list[tuple[str, str]]:
    """`count` (source, target) examples, the same for the same corpus and seed.

    They come from the second quarter by length: short examples keep the prompt cheap, and the shortest
    quarter holds single words.
    """
    order = np.argsort(train.lengths, kind="stable")
    middle = order[len(order) // 4 : len(order) // 2]
    indices = middle if len(middle) >= count else order
    step = -(-len(indices) // MAX_SHOT_CANDIDATES) or 1
    sentences = (train.sentence(int(index)) for index in indices[::step])
    return choose_shots(((s.src, s.tgt) for s in sentences), count, seed, train.pair)


def _fewshot_prompts(
    recipe: Recipe,
    train: PreparedSplit | None,
    pair: str,
    sentences: list[Sentence],
    tokenizer: PreTrainedTokenizerBase,
) -> list[list[int]]:
    if train is None or len(train) == 0:
        raise DataError(
            f"translate.systems: few-shot systems take their examples from the training split, and {pair} has none: "
            "add a corpus with `split: train` to data.corpora, or leave them out"
        )
    count = recipe.translate.shots
    # One more than needed: a sentence that is itself an example gets the next one instead.
    examples = fewshot_examples(train, count + 1, recipe.data_seed)
    form = prompt_format(recipe.data.prompt, tokenizer)
    prompts = [form.prompt(pair, s.src, shots_for(examples, (s.src, s.tgt), count)) for s in sentences]
    return TextEncoder(tokenizer).prompts(prompts)


def _own_prompt(split: PreparedSplit, index: int) -> list[int]:
    ids, prompt_length = split.tokens(index)
    return [int(token) for token in ids[:prompt_length]]
