"""The piecewise forward over packed examples against transformers' own forward of each example."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.segments import segments_of
from support.tiny_models import CONFIGS, WINDOW, examples, save, tiny_model
from transformers import PreTrainedModel

from lander_ds.config.recipe import ModelConfig
from lander_ds.models.attention import packed_attention
from lander_ds.models.family import Family
from lander_ds.models.loading import build, fill
from lander_ds.models.routed_ffn import Routing
from lander_ds.models.weights import BaseWeights

ROUTING = Routing(torch.tensor(0))


def packed_logits(
    model: PreTrainedModel, family: Family, sequences: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """Logits [T, vocabulary] of the sequences behind one another in one row."""
    lengths = tuple(len(sequence) for sequence in sequences)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    decoder = family.decoder_of(model)
    hidden = family.embed(decoder, torch.cat(sequences)[None], positions)
    arguments = family.layer_arguments(decoder, hidden, positions, segments_of(lengths))
    for index, layer in enumerate(family.layers_of(model)):
        hidden = family.run_layer(layer, hidden, arguments(index), ROUTING)
    logits = model.get_output_embeddings()(family.finish(model, hidden))[0]
    cap = family.softcap(model)
    return logits if cap is None else cap * torch.tanh(logits / cap)


@pytest.fixture(params=CONFIGS)
def loaded(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[PreTrainedModel, PreTrainedModel, Family]:
    """(transformers' model, ours, family) of every case."""
    reference = tiny_model(request.param)
    save(reference, tmp_path)
    model, family = build(ModelConfig(path=str(tmp_path), dtype="float32"))
    fill(model, family, BaseWeights(tmp_path), lambda unit: None)
    return reference, model, family


def test_packed_logits_equal_those_of_each_example_alone(
    loaded: tuple[PreTrainedModel, PreTrainedModel, Family],
) -> None:
    reference, model, family = loaded
    # Training mode: a base whose config.json has dropout must not get any here.
    model.train()
    with torch.no_grad():
        logits = packed_logits(model, family, examples())
        expected = torch.cat([reference(sequence[None]).logits[0] for sequence in examples()])
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_the_order_of_the_examples_does_not_matter(
    loaded: tuple[PreTrainedModel, PreTrainedModel, Family],
) -> None:
    _, model, family = loaded
    first, second, third = examples()
    with torch.no_grad():
        one = packed_logits(model.eval(), family, (first, second, third))
        other = packed_logits(model, family, (third, first, second))
    torch.testing.assert_close(one[: len(first)], other[len(third) : len(third) + len(first)])


def test_gradients_of_the_inputs_stay_inside_their_example(
    loaded: tuple[PreTrainedModel, PreTrainedModel, Family],
) -> None:
    _, model, family = loaded
    lengths = (5, 4)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    decoder = family.decoder_of(model)
    ids = torch.arange(3, 12)[None]
    hidden = family.embed(decoder, ids, positions).detach().requires_grad_()
    arguments = family.layer_arguments(decoder, hidden, positions, segments_of(lengths))
    out = hidden
    for index, layer in enumerate(family.layers_of(model)):
        out = family.run_layer(layer, out, arguments(index), ROUTING)
    family.finish(model, out)[0, 5:].square().sum().backward()
    assert hidden.grad is not None
    assert hidden.grad[0, :5].abs().max() == 0
    assert hidden.grad[0, 5:].abs().min() > 0


def naive_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    window: int,
    softcap: float | None,
) -> torch.Tensor:
    """Written out token by token: [heads, T, width] -> [T, heads, width]."""
    heads, length, width = query.shape
    out = torch.zeros(length, heads, width)
    for head in range(heads):
        shared = head // (heads // len(key))
        for t in range(length):
            seen = range(max(0, t - window + 1), t + 1)
            scores = torch.stack([query[head, t] @ key[shared, s] * scaling for s in seen])
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            weights = scores.softmax(0)
            out[t, head] = sum(weights[i] * value[shared, s] for i, s in enumerate(seen))
    return out


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_packed_attention_is_what_its_docstring_says(softcap: float | None) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 13, 8), torch.randn(1, 2, 13, 8), torch.randn(1, 2, 13, 8)
    lengths = (8, 1, 4)
    actual, weights = packed_attention(
        torch.nn.Identity(),
        query,
        key,
        value,
        None,
        scaling=0.3,
        segments=segments_of(lengths),
        sliding_window=WINDOW,
        softcap=softcap,
    )
    parts = [
        naive_attention(q, k, v, 0.3, WINDOW, softcap)
        for q, k, v in zip(*(tensor[0].split(lengths, 1) for tensor in (query, key, value)), strict=True)
    ]
    assert weights is None
    torch.testing.assert_close(actual[0], torch.cat(parts), atol=1e-5, rtol=1e-5)
