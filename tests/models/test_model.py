"""The module that DeepSpeed wraps, without DeepSpeed: losses per pair, additivity, where the graph begins."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import PAIRS, recipe_for, selection_for
from support.selections import random_selection
from support.tiny_models import DIFFERENT, VOCABULARY, laid_out, save, tiny_model
from torch.nn import functional
from transformers import PreTrainedModel

from lander_ds.config.recipe import Recipe
from lander_ds.data.batching.micro_batches import FILLER
from lander_ds.data.batching.packing import Example, PackedBatch, pack
from lander_ds.models.family import Family
from lander_ds.models.loading import build, fill
from lander_ds.models.parameter_groups import mark_trained, prepare_model
from lander_ds.models.routed_ffn import NO_PAIR
from lander_ds.models.span import Span, spans
from lander_ds.models.translation_model import (
    BatchTotals,
    GateStatistics,
    Objective,
    Tensors,
    TranslationModel,
    first_trained_layer,
)
from lander_ds.models.weights import BaseWeights

ONE = BatchTotals(target_tokens=1, examples=1)


def built(recipe: Recipe, span: Span | None = None) -> tuple[PreTrainedModel, Family]:
    """The model as training makes it, but in one process; outside the span it stays on meta."""
    model, family = build(recipe.model)
    selection = selection_for(recipe)
    prepare_model(model, family, recipe, selection)
    fill(model, family, BaseWeights(recipe.model.path), lambda unit: None, span=span)
    mark_trained(model, family, recipe.train, selection)
    return model, family


def wrapped(
    recipe: Recipe, span: Span | None = None, recompute: bool = False, **objective: Any
) -> TranslationModel:
    model, family = built(recipe, span)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".router.w2" in name or ".router.b2" in name:
            parameter.data.normal_(generator=generator)
    return TranslationModel(
        model,
        family,
        len(PAIRS),
        Objective(seed=recipe.seed, **objective),
        span,
        recompute=recompute,
    )


def examples() -> list[Example]:
    generator = np.random.default_rng(4)
    return [
        Example(generator.integers(3, VOCABULARY, length, dtype=np.int32), prompt, pair, 10 + number)
        for number, (length, prompt, pair) in enumerate(
            [(9, 4, 0), (7, 2, 1), (5, 3, 2), (11, 5, 0), (6, 6, 1)]
        )
    ]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return recipe_for(save(tiny_model("llama"), tmp_path / "base"), tmp_path / "run")


def gradients(module: TranslationModel, batch: list[Example], totals: BatchTotals) -> dict[str, torch.Tensor]:
    module.zero_grad(set_to_none=True)
    loss, _, _ = module(pack(batch), totals)
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", DIFFERENT)
def test_losses_are_those_of_each_example_alone(case: str, tmp_path: Path) -> None:
    plain = tiny_model(case)
    recipe = recipe_for(save(plain, tmp_path), tmp_path, "full")
    model, family = built(recipe)
    module = TranslationModel(model, family, len(PAIRS))
    texts = replace(examples()[0], pair_id=NO_PAIR)
    loss, per_pair, _ = module(pack([*examples(), texts]), BatchTotals(10, 5))
    # The last are those of no pair.
    sums, counts = torch.zeros(2, len(PAIRS) + 1, dtype=torch.float64)
    for example in (*examples(), texts):
        ids = torch.from_numpy(example.input_ids).long()
        with torch.no_grad():
            logits = plain(ids[None]).logits[0]
        prompt = example.prompt_length
        losses = functional.cross_entropy(logits[prompt - 1 : -1], ids[prompt:], reduction="none")
        sums[example.pair_id] += losses.double().sum()
        counts[example.pair_id] += len(losses)
    torch.testing.assert_close(per_pair[0], sums, rtol=1e-5, atol=1e-5)
    assert torch.equal(per_pair[1], counts)
    assert loss.item() == pytest.approx(float(sums.sum()) / 10, rel=1e-5)


@pytest.mark.parametrize("case", DIFFERENT)
@pytest.mark.parametrize("recompute", [False, True])
def test_kept_hidden_states_stand_for_the_layers_below(case: str, recompute: bool, tmp_path: Path) -> None:
    recipe = recipe_for(save(tiny_model(case), tmp_path / "base"), tmp_path / "run")
    model, family = build(recipe.model)
    selection = random_selection(family.neurons(model), (2,), PAIRS, seed=4)
    prepare_model(model, family, recipe, selection)
    fill(model, family, BaseWeights(recipe.model.path), lambda unit: None)
    mark_trained(model, family, recipe.train, selection)
    module = TranslationModel(model, family, len(PAIRS), Objective(0.4, 0.3), recompute=recompute)
    assert module.prefix_layers == 2
    batch, totals = pack(examples()), BatchTotals(20, 5)
    with torch.no_grad():
        (hidden,) = module(batch, totals, until=2)
        expected = module(batch, totals)
    # Whatever lies below is not asked any more.
    for layer in family.layers_of(model)[:2]:
        for parameter in layer.parameters():
            parameter.data.fill_(torch.nan)
    kept = replace(batch, prefix=hidden[0], prefix_layers=2)
    actual = module(kept, totals, alpha=0.0)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))
    actual[0].backward()
    gradients = [p.grad for p in module.parameters() if p.requires_grad]
    assert all(value is not None and value.isfinite().all() for value in gradients)


@pytest.mark.parametrize("gate", ["none", "input", "output"])
def test_gradients_of_a_mixed_batch_are_the_sum_over_its_pairs(recipe: Recipe, gate: str) -> None:
    """Identity 6 of the method, through the whole model."""
    module = wrapped(
        replace(recipe, routing=replace(recipe.routing, gate=gate)),  # type: ignore[arg-type]
        **({} if gate == "none" else {"budget_weight": 0.4, "budget": 0.3}),  # type: ignore[arg-type]
    )
    totals = BatchTotals(20, 5)
    mixed = gradients(module, examples(), totals)
    summed = {name: torch.zeros_like(value) for name, value in mixed.items()}
    for pair in range(len(PAIRS)):
        for name, value in gradients(module, [e for e in examples() if e.pair_id == pair], totals).items():
            summed[name] += value
    assert max(float(value.abs().max()) for value in mixed.values()) > 1e-3
    for name, value in mixed.items():
        torch.testing.assert_close(value, summed[name], atol=1e-6, rtol=1e-4, msg=name)


def test_a_filler_adds_nothing(recipe: Recipe) -> None:
    module = wrapped(recipe, budget_weight=0.4, budget=0.3)
    loss, per_pair, budget = module(pack([FILLER]), ONE)
    assert loss.item() == budget.item() == 0.0
    assert not per_pair.any()
    for name, value in gradients(module, [FILLER], ONE).items():
        assert not value.any(), name
    with_filler = gradients(module, [*examples(), FILLER], ONE)
    for name, value in gradients(module, examples(), ONE).items():
        torch.testing.assert_close(with_filler[name], value, msg=name)


def test_every_trained_parameter_gets_a_gradient_even_from_a_filler(recipe: Recipe) -> None:
    """Ranks must reduce the same gradients, whatever their examples are."""
    module = wrapped(recipe)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    for batch in ([FILLER], examples()[:1], examples()):
        assert set(gradients(module, batch, ONE)) == trained


def test_no_graph_below_the_first_trained_layer(tmp_path: Path) -> None:
    recipe = recipe_for(save(tiny_model("llama"), tmp_path / "base"), tmp_path / "run")
    model, family = built(recipe)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and ".layers.2." in name)
    module = TranslationModel(model, family, len(PAIRS))
    assert module.first_trained == 2
    graphs = {}
    for index, layer in enumerate(family.layers_of(model)):
        layer.register_forward_hook(
            lambda _, __, output, i=index: graphs.update(
                {i: (output[0] if isinstance(output, tuple) else output).requires_grad}
            )
        )
    module(pack(examples()), ONE)[0].backward()
    assert graphs == {0: False, 1: False, 2: True}


@pytest.mark.parametrize("case", ["llama", "llama-tied", "opt", "bloom"])
def test_where_the_graph_must_begin(case: str, tmp_path: Path) -> None:
    model = laid_out(case)
    save(model, tmp_path)
    model, family = build(recipe_for(tmp_path, tmp_path).model)
    layers = family.layers_of(model)

    def first(*trained: torch.Tensor) -> int:
        model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        return first_trained_layer(model, family)

    tied = model.get_output_embeddings().weight is family.embeddings_of(model).weight
    norm = getattr(family.decoder_of(model), family.final[0])
    assert first(next(layers[1].parameters())) == 1
    assert first(next(layers[2].parameters()), next(layers[1].parameters())) == 1
    assert first(next(norm.parameters())) == len(layers)
    assert first(*family.embeddings_of(model).parameters()) == 0
    if not tied:
        assert first(*model.get_output_embeddings().parameters()) == len(layers)
    assert first() == len(layers)


def test_noise_depends_on_the_sample_and_not_on_its_company(recipe: Recipe) -> None:
    module = wrapped(recipe)
    module.train()

    def losses(batch: list[Example]) -> torch.Tensor:
        return module(pack(batch), ONE, alpha=2.0)[1][0].detach()

    first, second = examples()[0], examples()[1]
    torch.testing.assert_close(losses([first, second]), losses([first]) + losses([second]))
    torch.testing.assert_close(losses([first]), losses([first]), atol=0, rtol=0)
    drawn_again = replace(first, sample_id=99)
    assert (losses([first]) - losses([drawn_again])).abs().max() > 1e-4
    own = module.objective
    module.objective = replace(own, seed=own.seed + 1)
    other_seed = losses([first])
    module.objective = own
    assert (losses([first]) - other_seed).abs().max() > 1e-4
    module.eval()
    assert torch.equal(losses([first]), losses([drawn_again])), "no noise in evaluation"


def test_recomputation_counts_no_gate_twice_and_follows_its_own_micro_batch(recipe: Recipe) -> None:
    """Backward passes come after the forward passes of later micro-batches, as in a pipeline."""
    results = []
    for recompute in (False, True):
        module = wrapped(recipe, recompute=recompute, budget_weight=0.4, budget=0.3)
        gates, batches = GateStatistics(), (examples()[:2], examples()[2:])
        losses = [module(pack(batch), ONE, alpha=1.5, gates=gates)[0] for batch in batches]
        for loss in losses:
            loss.backward()
        results.append(
            ({name: p.grad for name, p in module.named_parameters() if p.grad is not None}, gates.sums)
        )
    (plain, counted), (again, counted_again) = results
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, msg=name)
    assert list(counted) == [0, 2]
    for layer, sums in counted.items():
        assert sums[1].sum() == sum(len(example.input_ids) for example in examples())
        assert torch.equal(counted_again[layer], sums)


def run_spans(
    parts: list[TranslationModel], batch: PackedBatch, totals: BatchTotals
) -> tuple[Tensors, list[list[torch.Tensor]]]:
    """Forward and backward through spans as a pipeline runs them; (what the last returns, what came into each)."""
    arrived: list[list[torch.Tensor]] = []
    outputs: list[Tensors] = []
    for part in parts:
        crossing = part.crosses(part.span.start)
        arrived.append([t.detach().requires_grad_(crossing) for t in outputs[-1]] if outputs else [])
        outputs.append(part(batch, totals, *arrived[-1]))
        part.zero_grad(set_to_none=True)
    gradients: list[torch.Tensor] = [torch.ones(())]
    for part, given, built in zip(reversed(parts), reversed(arrived), reversed(outputs), strict=True):
        if not part.has_backward:
            break
        torch.autograd.backward(built[: len(gradients)], gradients)
        gradients = [tensor.grad for tensor in given]  # type: ignore[misc]
    return outputs[-1], arrived


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("case", DIFFERENT)
def test_spans_compute_what_the_whole_model_does(case: str, recompute: bool, tmp_path: Path) -> None:
    """Every family cut after each of its layers: losses, budget, and gradients of everything that is trained."""
    recipe = recipe_for(save(tiny_model(case), tmp_path / "base"), tmp_path / "run")
    options = {"budget_weight": 0.4, "budget": 0.3}
    complete = wrapped(recipe, recompute=recompute, **options)  # type: ignore[arg-type]
    totals, batch = BatchTotals(20, 5), pack(examples())
    expected = complete(batch, totals)
    wanted = gradients(complete, examples(), totals)
    parts = [wrapped(recipe, span, recompute, **options) for span in spans((1, 2), 3)]
    assert [part.has_backward for part in parts] == [True] * 3
    actual, arrived = run_spans(parts, batch, totals)
    for part, tensors in zip(parts[1:], arrived[1:], strict=True):
        empty = part.carried(batch)
        assert [(t.shape, t.dtype) for t in tensors] == [(t.shape, t.dtype) for t in empty]
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1])
    torch.testing.assert_close(actual[2], expected[2])
    names: set[str] = set()
    for part in parts:
        own = {id(p) for p in part.parameters()}
        inside = {id(p): p for p in part.parameters() if p.requires_grad}
        assert not any(p.is_meta for p in part.parameters())
        for name, parameter in part.model.named_parameters():
            assert parameter.is_meta == (id(parameter) not in own) or ".router." in name, name
            if id(parameter) in inside:
                names.add(name)
                torch.testing.assert_close(parameter.grad, complete.model.get_parameter(name).grad, msg=name)
    assert len(names) == len(wanted)


@pytest.mark.parametrize("trained", [0, 2])
def test_gradients_go_no_further_down_than_the_first_trained_layer(trained: int, tmp_path: Path) -> None:
    recipe = recipe_for(save(tiny_model("llama"), tmp_path / "base"), tmp_path / "run")
    parts = []
    for span in spans((1, 2), 3):
        model, family = built(recipe, span)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and f".layers.{trained}." in name)
        parts.append(TranslationModel(model, family, len(PAIRS), span=span))
    assert [part.crosses(part.span.start) for part in parts] == [False, trained < 1, trained < 2]
    assert [part.has_backward for part in parts] == [trained <= 0, trained <= 1, True]
    if trained < 2:
        _, arrived = run_spans(parts, pack(examples()), ONE)
        assert [bool(t and t[0].grad is not None) for t in arrived] == [False, trained < 1, trained < 2]


def test_detection_sends_gradients_down_to_the_embedding(tmp_path: Path) -> None:
    recipe = recipe_for(save(tiny_model("gemma3"), tmp_path / "base"), tmp_path / "run", "full")
    parts = []
    for span in spans((1, 2), 3):
        model, family = built(recipe, span)
        model.requires_grad_(False)
        parts.append(TranslationModel(model, family, len(PAIRS), span=span, input_gradients=True))
    _, arrived = run_spans(parts, pack(examples()), ONE)
    assert all(t[0].grad is not None and t[0].grad.abs().max() > 0 for t in arrived[1:])


def test_what_travels_is_small(recipe: Recipe) -> None:
    """Without a budget, or before the first gate, hidden states alone."""
    batch = pack(examples())
    first, second, third = (wrapped(recipe, span, budget_weight=0.4) for span in spans((1, 2), 3))
    assert [len(part.carried(batch)) for part in (second, third)] == [2, 2]
    assert len(wrapped(recipe, second.span).carried(batch)) == 1
    assert len(first(batch, ONE)) == 2
    assert first.carried(batch)[0].shape == (1, len(batch.input_ids), 32)
