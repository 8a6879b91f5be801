"""What each method trains, and in which parameter groups."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import LAYERS, PAIRS, recipe_for, selection_for
from support.tiny_models import save, tiny_model
from torch import nn
from transformers import PreTrainedModel

from lander_ds.common.errors import ConfigError
from lander_ds.config.recipe import Recipe
from lander_ds.config.schema.training import LearningRates
from lander_ds.method.select import divide
from lander_ds.method.selection import Bank, Selection
from lander_ds.models.loading import build, fill
from lander_ds.models.parameter_groups import Groups, mark_trained, prepare_model
from lander_ds.models.weights import BaseWeights
from lander_ds.training.optimizer import build_optimizer, learning_rate


def grouped(recipe: Recipe, selection: Selection) -> tuple[PreTrainedModel, dict[str, set[str]]]:
    """(model, group -> names of its parameters)."""
    model, family = build(recipe.model, attention=None)
    prepare_model(model, family, recipe, selection)
    fill(model, family, BaseWeights(recipe.model.path), lambda unit: None)
    groups = mark_trained(model, family, recipe.train, selection)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    actual = {group: {names[id(p)] for p in parameters} for group, parameters in groups.items()}
    flat = [p for parameters in groups.values() for p in parameters]
    assert len({id(p) for p in flat}) == len(flat), "a parameter is in two groups"
    assert {names[id(p)] for p in flat} == {n for n, p in model.named_parameters() if p.requires_grad}
    return model, actual


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Base models by case."""
    root = tmp_path_factory.mktemp("bases")
    return {case: save(tiny_model(case), root / case) for case in ("llama", "gemma3", "opt", "bloom")}


def recipe_of(bases: dict[str, Path], case: str, method: str, gate: str = "input", **train: Any) -> Recipe:
    recipe = recipe_for(bases[case], Path("unused"), method, gate)
    return replace(recipe, train=replace(recipe.train, **train))


ALL = {"general", "specific:en-de", "specific:en-fr", "specific:de-en", "specific:en-de+de-en"}


@pytest.mark.parametrize("case", ["llama", "opt"])
def test_banks_and_gates(bases: dict[str, Path], case: str) -> None:
    recipe = recipe_of(bases, case, "lander")
    selection = selection_for(recipe)
    model, actual = grouped(recipe, selection)
    assert set(actual) == ALL | {"gates"}
    parts = 3  # gate, up, down; or up, bias, down
    for layer in selection.layers:
        for number, bank in enumerate(layer.banks):
            where = {name for names in actual.values() for name in names if f".banks.{number}." in name}
            assert (len(where) == parts * len(LAYERS)) == (bank.kind != "frozen")
    group_of = {name: group for group, names in actual.items() for name in names}
    for name, group in group_of.items():
        if ".banks." in name:
            number = int(name.split(".banks.")[1].split(".")[0])
            bank = selection.layers[0].banks[number]
            expected = "general" if bank.kind == "general" else f"specific:{'+'.join(bank.owners)}"
            assert group == expected
    assert actual["gates"] == {
        name for name, _ in model.named_parameters() if name.split(".")[-2:-1] == ["router"]
    }
    assert len(actual["gates"]) == 4 * len(LAYERS)
    # The bias of the out-projection belongs to no neuron.
    assert not any("output_bias" in name for name in group_of)


@pytest.mark.parametrize(
    ("banks", "expected"), [(("general",), {"general"}), (("specific",), ALL - {"general"})]
)
def test_one_kind_of_bank_alone(bases: dict[str, Path], banks: tuple[str, ...], expected: set[str]) -> None:
    recipe = recipe_of(bases, "llama", "lander", gate="none", banks=banks)
    _, actual = grouped(recipe, selection_for(recipe))
    assert set(actual) == expected


def test_a_general_bank_of_some_pairs_has_its_own_group(bases: dict[str, Path]) -> None:
    """With `scope: per_pair` a layer may be selected by two of three pairs."""
    recipe = recipe_of(bases, "llama", "lander", gate="none")
    owned = torch.zeros(2, 48, dtype=torch.bool)
    owned[:, :40] = True
    owned[0, 40:] = True
    layer = divide(1, owned, PAIRS[:2])
    assert [bank.kind for bank in layer.banks] == ["general", "specific"]
    _, actual = grouped(recipe, Selection(PAIRS, 48, (layer,), {}))
    assert set(actual) == {"general:en-de+en-fr", "specific:en-de"}
    rates = LearningRates(general=0.1, specific=0.2)
    assert learning_rate("general:en-de+en-fr", replace(recipe.train, lr=rates)) == 0.1


def test_full_is_everything(bases: dict[str, Path]) -> None:
    recipe = recipe_of(bases, "gemma3", "full")
    model, actual = grouped(recipe, selection_for(recipe))
    assert actual == {"dense": {name for name, _ in model.named_parameters()}}


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("llama", {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}),
        ("opt", {"fc1.weight", "fc1.bias", "fc2.weight"}),
        ("bloom", {"dense_h_to_4h.weight", "dense_h_to_4h.bias", "dense_4h_to_h.weight"}),
    ],
)
def test_layers_is_what_the_banks_together_are(bases: dict[str, Path], case: str, expected: set[str]) -> None:
    recipe = recipe_of(bases, case, "layers")
    model, actual = grouped(recipe, selection_for(recipe))
    names = actual["dense"]
    assert len(names) == 3 * len(LAYERS)
    assert {".".join(name.rsplit(".", 2)[1:]) for name in names} == expected
    assert {int(part) for name in names for part in name.split(".") if part.isdigit()} == set(LAYERS)
    whole = sum(p.numel() for name, p in model.named_parameters() if name in names)
    banks = selection_for(recipe)
    all_trained = replace(banks, layers=tuple(replace(s, banks=_unfrozen(s.banks)) for s in banks.layers))
    routed, of_banks = grouped(recipe_of(bases, case, "lander", gate="none"), all_trained)
    in_banks = {name for names in of_banks.values() for name in names}
    assert whole == sum(p.numel() for name, p in routed.named_parameters() if name in in_banks)


def _unfrozen(banks: tuple[Bank, ...]) -> tuple[Bank, ...]:
    return tuple(Bank("general", PAIRS, b.size) if b.kind == "frozen" else b for b in banks)


@pytest.mark.parametrize("case", ["llama", "gemma3", "opt", "bloom"])
def test_lora_adapts_every_linear_layer_but_the_head(bases: dict[str, Path], case: str) -> None:
    recipe = recipe_of(bases, case, "lora")
    plain = tiny_model(case)
    head = plain.get_output_embeddings()
    linear = {n for n, m in plain.named_modules() if isinstance(m, nn.Linear) and m is not head}
    model, actual = grouped(recipe, selection_for(recipe))
    assert set(actual) == {"lora"}
    assert {name.split(".lora_")[0] for name in actual["lora"]} == linear
    for name in actual["lora"]:
        values = model.get_parameter(name)
        assert not values.is_meta
        assert (values.abs().max() == 0) == (".lora_B." in name)
    # At the start the adapters add nothing.
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)


def test_lora_starts_the_same_on_every_rank_and_differs_by_seed(bases: dict[str, Path]) -> None:
    def start(seed: int) -> dict[str, torch.Tensor]:
        recipe = replace(recipe_of(bases, "llama", "lora"), seed=seed)
        torch.manual_seed(int(torch.randint(1 << 30, ())))
        model, actual = grouped(recipe, selection_for(recipe))
        return {name: model.get_parameter(name) for name in actual["lora"] if ".lora_A." in name}

    one, same, other = start(1), start(1), start(2)
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert not any(torch.equal(value, other[name]) for name, value in one.items())
    assert len({float(value.detach().sum()) for value in one.values()}) == len(one), "no two are alike"


@pytest.mark.parametrize("banks", [("specific",), ("general",)])
def test_nothing_left_to_train_is_refused(bases: dict[str, Path], banks: tuple[str, ...]) -> None:
    kind = "general" if banks == ("specific",) else "specific"
    layer = divide(
        0,
        torch.ones(3 if kind == "general" else 1, 48, dtype=torch.bool),
        PAIRS[: 3 if kind == "general" else 1],
    )
    assert {bank.kind for bank in layer.banks} == {kind}
    recipe = recipe_of(bases, "llama", "lander", gate="none", banks=banks)
    with pytest.raises(ConfigError, match=r"nothing is left to train.*change select\.banks or train\.banks"):
        grouped(recipe, Selection(PAIRS, 48, (layer,), {}))


def test_every_group_gets_its_learning_rate(bases: dict[str, Path]) -> None:
    rates = LearningRates(general=0.1, specific=0.2, gates=0.3, dense=0.4, lora=0.5, shira=0.6)
    train = replace(recipe_of(bases, "llama", "lander").train, lr=rates, weight_decay=0.01)
    names = ("general", "specific:en-de", "gates", "dense", "lora", "shira")
    groups: Groups = {name: [nn.Parameter(torch.ones(2))] for name in names}
    for kind in ("adamw", "sgd"):
        optimizer = build_optimizer(groups, replace(train, optimizer=kind), offload=False)
        assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
        assert [g["name"] for g in optimizer.param_groups] == list(names)
        assert {g["weight_decay"] for g in optimizer.param_groups} == {0.01}
        assert not any(g["active"] for g in optimizer.param_groups), "until the trainer says so"
