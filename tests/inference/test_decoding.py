"""Batched decoding gives what decoding one sentence at a time gives."""

from __future__ import annotations

import pytest
import torch
from support.tiny_translator import requests, tiny_llama, tiny_tokenizer
from transformers import GenerationConfig

from lander_ds.config.recipe import TranslateConfig
from lander_ds.inference.decoding import Decoder, common_prefix_length, stop_tokens


def prompts(count: int, shared: int = 0) -> list[tuple[int, ...]]:
    return [request.prompt for request in requests({"en-de": count}, shared)["en-de"]]


@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_equals_its_sentences(beams: int) -> None:
    decoder = Decoder(tiny_llama(), tiny_tokenizer(), TranslateConfig(beams=beams, max_new_tokens=12))
    wanted = prompts(6)
    single = [decoder.decode([prompt])[0] for prompt in wanted]
    assert decoder.decode(wanted) == single
    assert len({hypothesis.text for hypothesis in single}) > 3


def test_greedy_equals_plain_generate() -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    for prompt in prompts(4):
        output = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=[2, 3], pad_token_id=0
        )[0, len(prompt) :]
        expected = tokenizer.decode(output, skip_special_tokens=True).partition("\n")[0].strip()
        found = Decoder(model, tokenizer, TranslateConfig(max_new_tokens=12)).decode([prompt])[0]
        assert found.text == expected
        assert found.tokens == len(output)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_shared_prefix_changes_nothing(beams: int) -> None:
    decoder = Decoder(tiny_llama(), tiny_tokenizer(), TranslateConfig(beams=beams, max_new_tokens=12))
    wanted = prompts(5, shared=20)
    prefix = decoder.shared_prefix(wanted)
    assert prefix.length >= 20
    expected = [decoder.decode([prompt])[0] for prompt in wanted]
    assert decoder.decode(wanted, prefix) == expected
    # The cache of the prefix is not used up by the first batch.
    assert decoder.decode(wanted[3:], prefix) == expected[3:]


def test_no_shared_prefix_where_a_sliding_window_could_be_outgrown() -> None:
    model = tiny_llama()
    model.config.sliding_window = 40
    wanted = prompts(5, shared=20)
    assert (
        Decoder(model, tiny_tokenizer(), TranslateConfig(max_new_tokens=30)).shared_prefix(wanted).length == 0
    )
    assert (
        Decoder(model, tiny_tokenizer(), TranslateConfig(max_new_tokens=4)).shared_prefix(wanted).length >= 20
    )


def test_the_models_own_generation_config_does_not_leak_in() -> None:
    model = tiny_llama()
    config, wanted = TranslateConfig(max_new_tokens=12), prompts(4)
    expected = Decoder(model, tiny_tokenizer(), config).decode(wanted)
    own = GenerationConfig(do_sample=True, temperature=9.0, repetition_penalty=5.0, max_length=15, top_k=5)
    model.generation_config = own
    assert Decoder(model, tiny_tokenizer(), config).decode(wanted) == expected
    assert model.generation_config is own


def test_a_translation_ends_at_the_line_end_and_at_the_end_of_sequence() -> None:
    tokenizer = tiny_tokenizer()
    assert stop_tokens(tokenizer) == [2, 3]
    decoder = Decoder(tiny_llama(), tokenizer, TranslateConfig(max_new_tokens=40))
    found = decoder.decode(prompts(12))
    ended = [hypothesis for hypothesis in found if hypothesis.tokens < 40]
    assert ended, "the model never ended a line: choose another seed"
    assert all("\n" not in hypothesis.text and "</s>" not in hypothesis.text for hypothesis in found)
    # The closing token is counted, and is no word of the translation.
    assert all(len(hypothesis.text.split()) < hypothesis.tokens for hypothesis in ended)


def test_common_prefix_leaves_a_token_of_every_prompt() -> None:
    assert common_prefix_length([(1, 2, 3), (1, 2, 4, 5)]) == 2
    assert common_prefix_length([(1, 2), (1, 2, 3)]) == 1
    assert common_prefix_length([(1, 2, 3)]) == 2
    assert common_prefix_length([(9, 2), (1, 2)]) == 0
