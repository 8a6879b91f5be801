"""SHiRA: which entries are trained, and that nothing but these moves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.checkpoints import recipe_for, selection_for, shape, write_checkpoint
from support.exports import dense, tensors
from support.tiny_models import save, tiny_model
from torch import nn

from lander_ds.common.errors import ConfigError
from lander_ds.config.recipe import Recipe
from lander_ds.config.schema.training import ShiraConfig
from lander_ds.models.loading import build
from lander_ds.models.parameter_groups import prepare_model
from lander_ds.models.shira import ENTRIES, ShiraLinear, drawn_entries, fold_shira

IDS = torch.arange(3, 12)[None]


def recipe_of(tmp_path: Path, case: str, r: int = 3) -> Recipe:
    recipe = recipe_for(save(tiny_model(case), tmp_path / "base"), tmp_path / "run", "shira")
    return replace(recipe, train=replace(recipe.train, shira=ShiraConfig(r=r)))


@pytest.mark.parametrize("case", ["llama", "gemma3", "opt", "bloom"])
def test_every_linear_layer_but_the_head_and_the_base_at_the_start(tmp_path: Path, case: str) -> None:
    recipe, plain = recipe_of(tmp_path, case), tiny_model(case)
    head = plain.get_output_embeddings()
    model, _ = shape(recipe, selection_for(recipe))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wanted = {
        f"{name}.{ENTRIES}": 3 * (module.in_features + module.out_features)
        for name, module in plain.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    assert {name: parameter.numel() for name, parameter in trained.items()} == wanted
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, atol=1e-5, rtol=1e-5)


def test_gradients_are_those_of_the_whole_matrix_at_the_entries(tmp_path: Path) -> None:
    recipe, plain = recipe_of(tmp_path, "llama"), tiny_model("llama")
    model, _ = shape(recipe, selection_for(recipe))
    for one in (model, plain):
        one(IDS).logits.square().sum().backward()
    compared = 0
    for name, module in model.named_modules():
        if isinstance(module, ShiraLinear):
            whole = plain.get_submodule(name).weight.grad
            assert isinstance(whole, torch.Tensor)
            actual = module.get_parameter(ENTRIES).grad
            torch.testing.assert_close(actual, whole.view(-1)[module.indices], atol=1e-4, rtol=1e-4)
            assert module.weight.grad is None
            compared += 1
    assert compared == 3 * 7


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_differs_from_the_base_at_the_entries_alone(tmp_path: Path, dtype: str) -> None:
    base = save(tiny_model("llama").to(getattr(torch, dtype)), tmp_path / "base")
    recipe = recipe_for(base, tmp_path / "run", "shira", dtype=dtype)
    trained = write_checkpoint(recipe)
    before, after = tensors(base), tensors(dense(recipe))
    adapted = {name.replace(ENTRIES, "weight"): values for name, values in trained.items()}
    for name, values in before.items():
        wanted = values.clone()
        if name in adapted:
            entries = drawn_entries(
                values.numel(), len(adapted[name]), recipe.seed, name.removesuffix(".weight")
            )
            wanted.view(-1)[entries] = adapted[name].to(values.dtype)
            assert not torch.equal(wanted, values)
        assert torch.equal(after[name], wanted), name


def test_a_folded_model_computes_the_same(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "opt")
    model, _ = shape(recipe, selection_for(recipe))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(ENTRIES):
                parameter.add_(0.3)
        before = model(IDS).logits
        fold_shira(model)
        assert not any(isinstance(module, ShiraLinear) for module in model.modules())
        torch.testing.assert_close(model(IDS).logits, before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("elements", "count"), [(1, 1), (7, 7), (10, 3), (99_991, 1000), (2**34, 5)])
def test_entries_are_different_and_in_order(elements: int, count: int) -> None:
    entries = drawn_entries(elements, count, 1, "layer")
    assert entries.shape == (count,)
    assert int(entries[0]) >= 0
    assert int(entries[-1]) < elements
    assert (entries.diff() > 0).all()


def test_entries_are_the_same_for_ever_and_other_ones_elsewhere() -> None:
    """Checkpoints do not hold them."""
    assert drawn_entries(1000, 6, 5, "model.layers.0.mlp.up_proj").tolist() == FIXED
    others = [drawn_entries(1000, 6, *where) for where in ((6, "model.layers.0.mlp.up_proj"), (5, "other"))]
    assert all(other.tolist() != FIXED for other in others)


FIXED = [61, 182, 395, 517, 766, 897]


def test_more_entries_than_a_matrix_has_are_refused(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "llama", r=40)
    model, family = build(recipe.model)
    with pytest.raises(
        ConfigError, match=r"train\.shira\.r: 40 would train \d+ entries of .*, at most|at most \d+ fits"
    ):
        prepare_model(model, family, recipe, None)
