"""The quantised base: what is rounded and how far, what is not, and that the product is that of the rounded weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import recipe_for, selection_for, shape
from support.tiny_models import DIFFERENT, save, tiny_model
from torch import nn
from transformers import PreTrainedModel

from lander_ds.config.recipe import Recipe
from lander_ds.config.schema.types import Quantization
from lander_ds.models.family import Family
from lander_ds.models.loading import build, fill
from lander_ds.models.parameter_groups import mark_trained, prepare_model
from lander_ds.models.quantization import (
    QuantizedFFN,
    QuantizedLinear,
    quantized_bytes,
    quantized_parameters,
    quantizing,
)
from lander_ds.models.routed_ffn import Routing, routed
from lander_ds.models.surgery import banks_of, routed_ffns, slices
from lander_ds.models.weights import BaseWeights

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

KINDS: tuple[Quantization, ...] = ("int8", "nf4")
LARGEST_ERROR = {"int8": 0.008, "nf4": 0.11}
"""Norm of the rounding of normally distributed weights over theirs."""
IDS = torch.arange(3, 12)[None]


def quantized(recipe: Recipe, kind: Quantization) -> tuple[PreTrainedModel, Family]:
    """The recipe's model as training fills it."""
    selection = selection_for(recipe)
    model, family = build(recipe.model, attention=None)
    prepare_model(model, family, recipe, selection)
    mark_trained(model, family, recipe.train, selection)
    placement = quantizing(kind, family.layers_of(model), lambda unit: None)
    fill(model, family, BaseWeights(recipe.model.path), placement)
    return model.eval(), family


def rounded(recipe: Recipe, kind: Quantization) -> PreTrainedModel:
    """The recipe's model with the rounded weights in place of those that are quantised."""
    model, family = shape(recipe, selection_for(recipe))
    for layer in family.layers_of(model):
        for parameter in quantized_parameters(layer):
            parameter.data = QuantizedLinear(parameter, None, kind).weight_in(parameter.dtype)
    return model


def logits_and_gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    with routed(Routing(torch.tensor(1))):
        logits = model(IDS).logits
    logits.square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(48, 64), (7, 37), (96, 100)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_of_any_width_are_rounded_alike(
    kind: Quantization, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Blocks run over the ends of rows whose width is no multiple of theirs."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    projection = QuantizedLinear(weight, None, kind)
    after = projection.weight_in(dtype)
    assert (after.shape, after.dtype) == (weight.shape, dtype)
    difference = (after.float() - weight.float()).norm() / weight.float().norm()
    assert 0 < float(difference) < LARGEST_ERROR[kind]
    held = sum(parameter.nbytes for parameter in projection.parameters())
    assert held == quantized_bytes(weight.numel(), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_no_pass_keeps_the_weights(kind: Quantization) -> None:
    projection = QuantizedLinear(
        torch.randn(64, 32), nn.Parameter(torch.randn(64), requires_grad=False), kind
    )
    x = torch.randn(5, 32, requires_grad=True)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = projection(x)
    assert kept == []
    y.sum().backward()
    weight = projection.weight_in(torch.float32)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight.sum(0).expand(5, -1))
    assert projection.bias is not None
    torch.testing.assert_close(y.detach(), x.detach() @ weight.t() + projection.bias)


@pytest.mark.parametrize(("method", "kind"), [("lander", "nf4"), ("lora", "int8")])
@pytest.mark.parametrize("case", [case for case in DIFFERENT if not case.endswith("moe")])
def test_every_family_computes_with_the_rounded_weights(
    case: str, method: str, kind: Quantization, tmp_path: Path
) -> None:
    """Logits and the gradients of all that is trained are those of the model that holds the rounded weights."""
    recipe = recipe_for(save(tiny_model(case), tmp_path / "base"), tmp_path / "run", method)
    model, family = quantized(recipe, kind)
    for layer in family.layers_of(model):
        assert list(quantized_parameters(layer)) == [], "nothing is left that could be quantised"
    actual, expected = logits_and_gradients(model), logits_and_gradients(rounded(recipe, kind))
    assert actual.keys() == expected.keys()
    assert len(actual) > 1
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("case", ["llama", "opt", "gemma3"])
def test_selected_neurons_and_what_is_no_projection_hold_the_exact_base(case: str, tmp_path: Path) -> None:
    recipe = recipe_for(save(tiny_model(case), tmp_path / "base"), tmp_path / "run", dtype="bfloat16")
    plain, _ = shape(recipe, selection_for(recipe))
    model, _ = quantized(recipe, "nf4")
    before = dict(plain.named_parameters())
    same = {name for name, parameter in model.named_parameters() if name in before}
    assert all(torch.equal(model.get_parameter(name), before[name]) for name in same)
    routed_names = [name for name, _ in routed_ffns(plain)]
    banks = {name for name in slices(plain) if ".banks." in name}
    frozen = {
        f"{name}.banks.{len(banks_of(ffn)) - 1}.{role}"
        for name, ffn in routed_ffns(plain)
        for role, _ in banks_of(ffn)[-1].named_parameters()
    }
    assert routed_names
    assert banks - frozen <= same
    assert frozen.isdisjoint(same)
    for _, ffn in routed_ffns(model):
        assert isinstance(ffn.rest, QuantizedFFN)
        assert "frozen" not in {bank.kind for bank in banks_of(ffn)}
    assert not isinstance(model.get_output_embeddings(), QuantizedLinear)
    outside = {name for name, p in before.items() if p.dim() < 2 and "banks" not in name}
    assert outside <= same, "norms, biases and gates"
    assert all(p.dtype != torch.float32 for p in model.parameters()), "an engine would change them"


def test_a_layer_is_quantised_before_the_next_is_read(tmp_path: Path) -> None:
    recipe = recipe_for(save(tiny_model("llama"), tmp_path / "base"), tmp_path / "run", "lora")
    model, family = build(recipe.model, attention=None)
    prepare_model(model, family, recipe, None)
    mark_trained(model, family, recipe.train, None)
    layers = list(family.layers_of(model))
    seen: list[int] = []

    def placed(unit: nn.Module) -> None:
        if unit in layers:
            number = layers.index(unit)
            assert all(not list(quantized_parameters(layer)) for layer in layers[:number])
            seen.append(number)

    fill(model, family, BaseWeights(recipe.model.path), quantizing("nf4", family.layers_of(model), placed))
    assert seen == [0, 1, 2]
