"""A tiny word-level tokenizer and a random LLaMA that translates with it: real classes, milliseconds."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from lander_ds.config.schema.results import SamplingConfig, TranslateConfig
from lander_ds.inference.translate import Request, translate

COUNTS = {"en-de": 7, "en-fr": 2}
"""Requests by pair."""
KEY = "k" * 64
_GREEDY = TranslateConfig(batch_size=3, max_new_tokens=8)
_SAMPLED = replace(_GREEDY, sampling=SamplingConfig(temperature=1.0, top_k=40, seed=4))
CONFIGS = {
    "greedy": _GREEDY,
    "sampled": _SAMPLED,
    # Several ranks then keep step, as sharded weights need it.
    "sampled-in-step": replace(_SAMPLED, weights="sharded"),
}
"""Ways to decode, by the name of the directory that the translations are written to."""

WORDS = [f"w{number}" for number in range(60)]
SPECIAL = ["<pad>", "<s>", "</s>", "\n"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; line ends are a token of their own."""
    vocabulary = {word: number for number, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="w0"
    )


def tiny_llama() -> LlamaForCausalLM:
    """Random weights, large enough that different inputs give different outputs."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


class TinyTranslator:
    """An inference model that notes the pairs it was told."""

    def __init__(self) -> None:
        self.model: PreTrainedModel = tiny_llama()
        self.pairs: list[str] = []

    @contextmanager
    def pair(self, pair: str) -> Iterator[None]:
        """Note the pair."""
        self.pairs.append(pair)
        yield


class FailsAfter(TinyTranslator):
    """Fails at the given call of `generate`, like a machine that is switched off."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        generate, self.calls = self.model.generate, 0

        def failing(**arguments: object) -> object:
            self.calls += 1
            if self.calls > calls:
                raise KeyboardInterrupt
            return generate(**arguments)

        self.model.generate = failing


def requests(pairs: dict[str, int], shared: int = 0) -> dict[str, list[Request]]:
    """Random prompts of several lengths: pair -> that many requests, `shared` equal tokens in front."""
    generator = random.Random(3)

    def words(count: int) -> tuple[int, ...]:
        return tuple(generator.randrange(4, 64) for _ in range(count))

    built = {}
    for pair, count in pairs.items():
        prefix = words(shared)
        built[pair] = [
            Request(
                f"{pair}:test:{number}",
                f"source {number}",
                f"reference {number}",
                prefix + words(generator.randrange(2, 12)),
            )
            for number in range(count)
        ]
    return built


def translate_as_rank(directory: Path, rank: int, world_size: int, port: int) -> None:
    """What one of several processes runs: a gloo rank that translates the same requests in every way."""
    torch.set_num_threads(1)
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(world_size)})
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size
    )
    try:
        for name, config in CONFIGS.items():
            translate(TinyTranslator(), tiny_tokenizer(), requests(COUNTS), config, directory / name, KEY)
    finally:
        torch.distributed.destroy_process_group()
