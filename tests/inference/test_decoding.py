"""Batched decoding gives what decoding one sentence at a time gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_translator import requests, tiny_llama, tiny_tokenizer
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GenerationConfig, PreTrainedModel

from lander_ds.common.errors import ModelError
from lander_ds.config.schema.results import TranslateConfig
from lander_ds.inference.decoding import (
    ROUND,
    Decoder,
    Hypothesis,
    common_prefix_length,
    end_tokens,
    line_end_tokens,
)
from lander_ds.inference.open import generation_config


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
        actual = Decoder(model, tokenizer, TranslateConfig(max_new_tokens=12)).decode([prompt])[0]
        assert actual.text == expected
        assert actual.tokens == len(output)


def tiny_sliding_gemma() -> PreTrainedModel:
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    heads = {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": tiny_llama().config.vocab_size}
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
    config = Gemma3TextConfig(**sizes, **heads, **layers, tie_word_embeddings=False, eos_token_id=2)
    model = Gemma3ForCausalLM(config)
    # Weights of the usual initial scale make every token repeat itself.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


@pytest.mark.parametrize("build", [tiny_llama, tiny_sliding_gemma])
def test_rows_that_have_ended_are_not_computed_any_more(build: Callable[[], PreTrainedModel]) -> None:
    model, tokenizer, wanted = build(), tiny_tokenizer(), prompts(12)
    decoder = Decoder(model, tokenizer, TranslateConfig(max_new_tokens=5 * ROUND))
    rows: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    actual = decoder.decode(wanted)
    together = list(rows)
    assert actual == [decoder.decode([prompt])[0] for prompt in wanted]
    lengths = [hypothesis.tokens for hypothesis in actual]
    assert min(lengths) < ROUND < max(lengths)
    assert together == sorted(together, reverse=True)
    # A row is computed up to the end of the round in which it ends.
    assert sum(together) == sum(min(-(-n // ROUND) * ROUND, max(lengths)) for n in lengths)


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
    assert line_end_tokens(tokenizer) == [3]
    assert end_tokens(tiny_llama().generation_config, tokenizer) == [2]
    decoder = Decoder(tiny_llama(), tokenizer, TranslateConfig(max_new_tokens=40))
    actual = decoder.decode(prompts(12))
    ended = [hypothesis for hypothesis in actual if hypothesis.tokens < 40]
    assert ended, "the model never ended a line: choose another seed"
    assert all("\n" not in hypothesis.text and "</s>" not in hypothesis.text for hypothesis in actual)
    # The closing token is counted, and is no word of the translation.
    assert all(len(hypothesis.text.split()) < hypothesis.tokens for hypothesis in ended)


def written(decoder: Decoder, number: int, stop: str = "") -> tuple[list[str], Hypothesis]:
    hypothesis = decoder.decode([prompts(number + 1)[number]], stop=stop)[0]
    return hypothesis.text.split(), hypothesis


def long_prompt(decoder: Decoder) -> int:
    """A prompt after which the model writes a long line."""
    return next(number for number in range(60) if len(written(decoder, number)[0]) >= 8)


@pytest.mark.parametrize("several", [False, True])
def test_end_tokens_of_the_models_own_configuration_end_a_translation(several: bool) -> None:
    tokenizer, config = tiny_tokenizer(), TranslateConfig(max_new_tokens=40)
    number = long_prompt(Decoder(tiny_llama(), tokenizer, config))
    words, _ = written(Decoder(tiny_llama(), tokenizer, config), number)
    end = tokenizer.convert_tokens_to_ids(words[4])
    model = tiny_llama()
    model.generation_config.eos_token_id = [2, end] if several else end
    expected = words[: words.index(words[4])]
    got, hypothesis = written(Decoder(model, tokenizer, config), number)
    assert got == expected
    assert (hypothesis.tokens, hypothesis.truncated) == (len(expected) + 1, False)


@pytest.mark.parametrize("beams", [1, 3])
def test_the_separator_of_examples_ends_a_translation_across_tokens(beams: int) -> None:
    decoder = Decoder(tiny_llama(), tiny_tokenizer(), TranslateConfig(max_new_tokens=40, beams=beams))
    number = long_prompt(decoder)
    words, whole = written(decoder, number)
    # It begins inside one token and ends inside another.
    stop = f"{words[4][-1]} {words[5][:2]}"
    text = whole.text
    _, hypothesis = written(decoder, number, stop)
    assert stop not in hypothesis.text
    assert not hypothesis.truncated
    if beams == 1:
        assert hypothesis.text == text.partition(stop)[0].strip()
        assert hypothesis.tokens < whole.tokens
    together = decoder.decode([prompts(number + 1)[number], *prompts(6)], stop=stop)
    assert together[0].text == hypothesis.text


def test_blanks_of_a_separator_need_not_be_there_at_the_ends() -> None:
    tokenizer, config = tiny_tokenizer(), TranslateConfig(max_new_tokens=6)
    decoder = Decoder(tiny_llama(), tokenizer, config)
    number = long_prompt(Decoder(tiny_llama(), tokenizer, TranslateConfig(max_new_tokens=40)))
    words, _ = written(decoder, number)
    first = decoder.decode([prompts(number + 1)[number]], stop=f" {words[0]} ")[0]
    assert (first.text, first.truncated) == ("", False)
    last = decoder.decode([prompts(number + 1)[number]], stop=f" {words[5]} ")[0]
    assert last.text == " ".join(words[: words.index(words[5])])
    assert not last.truncated


def test_special_tokens_of_a_separator_end_a_translation() -> None:
    tokenizer, config = tiny_tokenizer(), TranslateConfig(max_new_tokens=40)
    number = long_prompt(Decoder(tiny_llama(), tokenizer, config))
    words, _ = written(Decoder(tiny_llama(), tokenizer, config), number)
    tokenizer.add_special_tokens({"additional_special_tokens": [words[4]]})
    decoder = Decoder(tiny_llama(), tokenizer, config)
    expected = words[: words.index(words[4])]
    for stop in (words[4], f" {words[4]} and more"):
        got, hypothesis = written(decoder, number, stop)
        assert (got, hypothesis.truncated) == (expected, False)
        assert hypothesis.tokens == len(expected) + 1


def test_what_stands_after_a_separator_does_not_depend_on_the_batch() -> None:
    for pad_is_end in (False, True):
        tokenizer = tiny_tokenizer()
        if pad_is_end:
            tokenizer.pad_token = tokenizer.eos_token
        decoder = Decoder(tiny_llama(), tokenizer, TranslateConfig(max_new_tokens=40))
        number = long_prompt(decoder)
        words, _ = written(decoder, number)
        stop = f"{words[2][-1]} {words[3][:2]}"
        batch = [prompts(number + 1)[number], *prompts(6)]
        assert decoder.decode(batch, stop=stop) == [
            decoder.decode([prompt], stop=stop)[0] for prompt in batch
        ]


def test_translations_that_are_cut_short_are_marked() -> None:
    tokenizer = tiny_tokenizer()
    decoder = Decoder(tiny_llama(), tokenizer, TranslateConfig(max_new_tokens=40))
    number = long_prompt(decoder)
    words, whole = written(decoder, number)
    short = Decoder(tiny_llama(), tokenizer, TranslateConfig(max_new_tokens=5))
    got, hypothesis = written(short, number)
    assert (got, hypothesis.truncated, hypothesis.tokens) == (words[:5], True, 5)
    # One that ends with its last allowed token is whole.
    if not whole.truncated:
        exact = Decoder(tiny_llama(), tokenizer, TranslateConfig(max_new_tokens=whole.tokens))
        assert written(exact, number)[1] == whole


def test_common_prefix_leaves_a_token_of_every_prompt() -> None:
    assert common_prefix_length([(1, 2, 3), (1, 2, 4, 5)]) == 2
    assert common_prefix_length([(1, 2), (1, 2, 3)]) == 1
    assert common_prefix_length([(1, 2, 3)]) == 2
    assert common_prefix_length([(9, 2), (1, 2)]) == 0


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({}, None, None),
        ({"eos_token_id": 5}, None, [5]),
        ({"eos_token_id": [5, 6]}, {"eos_token_id": [6, 9]}, [6, 9, 5]),
        ({"text_config": {"eos_token_id": 7}}, {"eos_token_id": 3}, [3, 7]),
        ({}, {"eos_token_id": [1, 106], "top_k": 64}, [1, 106]),
    ],
)
def test_ends_are_those_that_stand_in_files(
    tmp_path: Path, config: dict[str, Any], generation: dict[str, Any] | None, expected: list[int] | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert generation_config(tmp_path).eos_token_id == expected


def test_a_broken_generation_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"generation_config\.json cannot be read .*repair or delete it"):
        generation_config(tmp_path)
