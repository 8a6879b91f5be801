"""The module that DeepSpeed wraps, without DeepSpeed: losses per pair, additivity, where the graph begins."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import PAIRS, recipe_for, selection_for
from support.tiny_models import CONFIGS, VOCABULARY, save, tiny_model
from torch.nn import functional
from transformers import PreTrainedModel

from lander_ds.config.recipe import Recipe
from lander_ds.data.packing import Example, pack
from lander_ds.families.family import Family
from lander_ds.families.loading import build, fill
from lander_ds.families.weights import BaseWeights
from lander_ds.routing.routed_ffn import RoutingState
from lander_ds.training.batches import FILLER
from lander_ds.training.groups import mark_trained, prepare_model
from lander_ds.training.model import Normaliser, TranslationModel, first_trained_layer

ONE = Normaliser(target_tokens=1, examples=1)


def made(recipe: Recipe) -> tuple[PreTrainedModel, Family, RoutingState | None]:
    """The model as training makes it, but in one process."""
    model, family = build(recipe.model)
    selection = selection_for(recipe)
    state = prepare_model(model, family, recipe, selection)
    fill(model, family, BaseWeights(recipe.model.path), lambda unit: None)
    mark_trained(model, family, recipe.train, selection)
    return model, family, state


def wrapped(recipe: Recipe, **options: float) -> TranslationModel:
    model, family, state = made(recipe)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".router.w2" in name or ".router.b2" in name:
            parameter.data.normal_(generator=generator)
    return TranslationModel(model, family, len(PAIRS), state, seed=recipe.seed, **options)  # type: ignore[arg-type]


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


def gradients(module: TranslationModel, batch: list[Example], norm: Normaliser) -> dict[str, torch.Tensor]:
    module.zero_grad(set_to_none=True)
    loss, _, _ = module(pack(batch), norm)
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", CONFIGS)
def test_losses_are_those_of_each_example_alone(case: str, tmp_path: Path) -> None:
    plain = tiny_model(case)
    recipe = recipe_for(save(plain, tmp_path), tmp_path, "full")
    model, family, _ = made(recipe)
    module = TranslationModel(model, family, len(PAIRS))
    loss, per_pair, _ = module(pack(examples()), Normaliser(10, 5))
    sums, counts = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for example in examples():
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


@pytest.mark.parametrize("gate", ["none", "input", "output"])
def test_gradients_of_a_mixed_batch_are_the_sum_over_its_pairs(recipe: Recipe, gate: str) -> None:
    """Identity 6 of the method, through the whole model."""
    module = wrapped(
        replace(recipe, routing=replace(recipe.routing, gate=gate)),  # type: ignore[arg-type]
        **({} if gate == "none" else {"budget_weight": 0.4, "budget": 0.3}),
    )
    norm = Normaliser(20, 5)
    mixed = gradients(module, examples(), norm)
    summed = {name: torch.zeros_like(value) for name, value in mixed.items()}
    for pair in range(len(PAIRS)):
        for name, value in gradients(module, [e for e in examples() if e.pair_id == pair], norm).items():
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
    model, family, state = made(recipe)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and ".layers.2." in name)
    module = TranslationModel(model, family, len(PAIRS), state)
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
    model = tiny_model(case)
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
    state = module.state
    assert state is not None
    state.alpha = 2.0
    module.train()

    def losses(batch: list[Example]) -> torch.Tensor:
        return module(pack(batch), ONE)[1][0].detach()

    first, second = examples()[0], examples()[1]
    torch.testing.assert_close(losses([first, second]), losses([first]) + losses([second]))
    torch.testing.assert_close(losses([first]), losses([first]), atol=0, rtol=0)
    drawn_again = replace(first, sample_id=99)
    assert (losses([first]) - losses([drawn_again])).abs().max() > 1e-4
    module.seed += 1
    other_seed = losses([first])
    module.seed -= 1
    assert (losses([first]) - other_seed).abs().max() > 1e-4
    module.eval()
    assert torch.equal(losses([first]), losses([drawn_again])), "no noise in evaluation"
