"""What is drawn has the model's probabilities and depends on the seed, the prompt and the number of the sample alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.tiny_translator import requests, tiny_llama, tiny_tokenizer

from lander_ds.config.recipe import ModelConfig, Recipe
from lander_ds.config.schema.data import DataConfig
from lander_ds.config.schema.results import SamplingConfig, TranslateConfig
from lander_ds.inference.decoding import ROUND, Decoder, Hypothesis
from lander_ds.inference.provenance import options_of
from lander_ds.inference.sampling import Sampler

WARM = SamplingConfig(temperature=0.8, seed=1)
CONFIG = TranslateConfig(sampling=WARM, max_new_tokens=2 * ROUND)
CPU = torch.device("cpu")


def prompts(count: int, shared: int = 0) -> list[tuple[int, ...]]:
    return [request.prompt for request in requests({"en-de": count}, shared)["en-de"]]


def decoder(config: TranslateConfig = CONFIG, **sampling: Any) -> Decoder:
    config = replace(config, sampling=replace(config.sampling, **sampling))
    return Decoder(tiny_llama(), tiny_tokenizer(), config)


def frequencies(config: SamplingConfig, logits: torch.Tensor) -> torch.Tensor:
    """How often each token is drawn from the same logits [V] in 20,000 samples."""
    sampler = Sampler(config, [(1, 2)], 20_000, CPU)
    drawn = sampler(torch.zeros(20_000, 1), logits.repeat(20_000, 1)).argmax(1)
    return torch.bincount(drawn, minlength=len(logits)) / 20_000


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_are_drawn_with_their_probability(temperature: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5, -30.0])
    expected = (logits / temperature).softmax(0)
    actual = frequencies(SamplingConfig(temperature=temperature), logits)
    # Five standard deviations of a frequency near one half.
    torch.testing.assert_close(actual, expected, atol=0.018, rtol=0)


@pytest.mark.parametrize(
    ("cut", "left"),
    [
        ({"top_k": 2}, [0, 4]),
        ({"top_p": 0.5}, [0, 4]),
        ({"top_k": 3, "top_p": 0.4}, [0]),
        ({"top_k": 99}, None),
    ],
)
def test_what_is_cut_off_is_not_drawn(cut: dict[str, Any], left: list[int] | None) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5, 0.5])
    kept = list(range(6)) if left is None else left
    actual = frequencies(SamplingConfig(temperature=1.0, **cut), logits)
    assert actual.nonzero().flatten().tolist() == kept
    torch.testing.assert_close(actual[kept], logits[kept].softmax(0), atol=0.018, rtol=0)


def test_next_to_no_temperature_is_greedy_search() -> None:
    greedy = Decoder(tiny_llama(), tiny_tokenizer(), replace(CONFIG, sampling=SamplingConfig()))
    assert decoder(temperature=1e-60).decode(prompts(6)) == greedy.decode(prompts(6))


def test_neither_batch_nor_order_changes_a_sample() -> None:
    wanted, sampled = prompts(64), decoder(top_k=40, top_p=0.95)

    def drawn(size: int, order: list[int]) -> dict[int, list[Hypothesis]]:
        batches = [order[first : first + size] for first in range(0, len(order), size)]
        return {
            index: samples
            for batch in batches
            for index, samples in zip(batch, sampled.search([wanted[i] for i in batch], 2), strict=True)
        }

    one = drawn(1, list(range(64)))
    for other in (drawn(3, list(range(63, -1, -1))), drawn(64, list(range(64)))):
        for index, samples in one.items():
            for sample, again in zip(samples, other[index], strict=True):
                assert replace(again, score=None) == replace(sample, score=None)
                assert again.score == pytest.approx(sample.score, rel=1e-4)
    assert len({sample.text for samples in one.values() for sample in samples}) > 100
    assert {sample.tokens > ROUND for samples in one.values() for sample in samples} == {True, False}


def test_a_sample_has_a_number_whatever_the_number_of_samples() -> None:
    wanted, sampled = prompts(3), decoder()
    four = sampled.search(wanted, 4)
    two = sampled.search(wanted, 2)
    assert [[s.text for s in samples] for samples in two] == [[s.text for s in s4[:2]] for s4 in four]
    assert [sample.text for sample in sampled.decode(wanted)] == [samples[0].text for samples in four]
    assert all(len({sample.text for sample in samples}) == 4 for samples in four)
    assert sampled.decode(wanted) != decoder(seed=2).decode(wanted)


def test_a_shared_prefix_and_a_separator_change_nothing() -> None:
    wanted, sampled = prompts(5, shared=20), decoder()
    prefix = sampled.shared_prefix(wanted)
    assert prefix.length >= 20
    expected = [[s.text for s in samples] for samples in sampled.search(wanted, 2)]
    assert [[s.text for s in samples] for samples in sampled.search(wanted, 2, prefix)] == expected
    stop = expected[0][0].split()[2]
    stopped = sampled.search(wanted, 2, prefix, f" {stop} ")
    assert stopped[0][0].text == expected[0][0].partition(f" {stop} ")[0]


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_the_score_is_what_the_model_itself_says(penalty: float) -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    config = replace(CONFIG, length_penalty=penalty, sampling=replace(WARM, top_k=5))
    compared = {True: 0, False: 0}
    for prompt in prompts(6):
        for sample in Decoder(model, tokenizer, config).search([prompt], 4)[0]:
            ids = tokenizer.convert_tokens_to_ids(sample.text.split())
            if sample.tokens != len(ids) + (not sample.truncated):
                continue  # It has drawn padding, which the text does not show.
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 :].log_softmax(1)
            written = sum(float(logits[place, token]) for place, token in enumerate(ids))
            # The end of sequence or the line end: neither is in the text.
            last = [0.0] if sample.truncated else logits[len(ids), 2:4].tolist()
            expected = [(written + end) / sample.tokens**penalty for end in last]
            assert any(sample.score == pytest.approx(value, rel=1e-4) for value in expected)
            compared[sample.truncated] += 1
    assert all(compared.values())


def test_records_of_other_decoding_stay_as_they_are() -> None:
    greedy = Recipe("run", ModelConfig("base"), DataConfig(("en-de",), ()), deepspeed="unused")
    before = {"system", "dtype", "limit", "split", "beams", "length_penalty", "max_new_tokens"}
    assert set(options_of(greedy, "trained")) == before
    warm = replace(greedy, translate=replace(greedy.translate, sampling=replace(WARM, seed=None)))
    recorded = [options_of(recipe, "trained") for recipe in (warm, replace(warm, seed=2))]
    assert [options["sampling"]["seed"] for options in recorded] == [1, 2]
    assert recorded[0]["sampling"]["temperature"] == WARM.temperature
