"""The descriptions themselves, the hook on h, and adding a family of one's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.tiny_models import CONFIGS, GATED, examples, laid_out, save, tiny_model
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lander_ds.common.errors import ModelError
from lander_ds.config.recipe import ModelConfig
from lander_ds.models import catalogue
from lander_ds.models.catalogue import families, family_of, register
from lander_ds.models.loading import build, fill
from lander_ds.models.weights import BaseWeights


def test_every_promised_family_is_described() -> None:
    for kind in (
        "gemma3_text",
        "gemma",
        "gemma2",
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "bloom",
        "gpt_neox",
        "opt",
    ):
        assert kind in family_of(kind).model_types
    assert len({family.name for family in families()}) == len(families())


def test_an_unknown_family_is_refused_with_the_known_ones_and_a_way_out() -> None:
    with pytest.raises(ModelError, match=r"'mamba'.*known: bloom,.*qwen3.*register"):
        family_of("mamba")


def activation_by_hand(layer: nn.Module, case: str, z: torch.Tensor) -> torch.Tensor:
    if case.startswith("gemma"):
        return functional.gelu(z, approximate="tanh")
    if case.startswith("bloom"):
        return functional.gelu(z, approximate="tanh")
    if case.startswith("gpt_neox"):
        return functional.gelu(z)
    return torch.relu(z) if case.startswith("opt") else functional.silu(z)


@pytest.mark.parametrize("case", [case for case in CONFIGS if not case.endswith("moe")])
def test_a_hook_on_the_down_projection_sees_h(case: str) -> None:
    model = laid_out(case)
    family = family_of(model.config.model_type)
    seen: dict[str, list[torch.Tensor]] = {"x": [], "h": []}
    downs = family.down_projections(model)
    assert len(downs) == len(family.layers_of(model)) == 3
    for layer, down in zip(family.layers_of(model), downs, strict=True):
        up = layer.get_submodule(family.ffn.up)
        up.register_forward_pre_hook(lambda _, inputs: seen["x"].append(inputs[0]))
        down.register_forward_pre_hook(lambda _, inputs: seen["h"].append(inputs[0]))
    with torch.no_grad():
        model(examples()[0][None])
    for layer, x, h in zip(family.layers_of(model), seen["x"], seen["h"], strict=True):
        up = layer.get_submodule(family.ffn.up)
        if family.ffn.fused:
            gating, linear = (x @ up.weight.T).chunk(2, dim=-1)  # type: ignore[operator]
            expected = activation_by_hand(layer, case, gating) * linear
        elif case in GATED:
            assert family.ffn.gate is not None
            gate = layer.get_submodule(family.ffn.gate)
            expected = activation_by_hand(layer, case, x @ gate.weight.T) * (x @ up.weight.T)  # type: ignore[operator]
        else:
            expected = activation_by_hand(layer, case, x @ up.weight.T + up.bias)  # type: ignore[operator]
        assert h.shape[-1] == family.neurons(model)
        torch.testing.assert_close(h, expected, atol=1e-5, rtol=1e-5)


class WaspConfig(LlamaConfig):
    """A model type that nobody has described yet."""

    model_type = "wasp"


class WaspForCausalLM(LlamaForCausalLM):
    """Its model."""

    config_class = WaspConfig


def test_a_family_of_ones_own_can_be_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "_FAMILIES", dict(catalogue._FAMILIES))
    AutoConfig.register("wasp", WaspConfig, exist_ok=True)
    AutoModelForCausalLM.register(WaspConfig, WaspForCausalLM, exist_ok=True)
    config = WaspConfig(**{**tiny_model("llama").config.to_dict(), "model_type": "wasp"})
    reference: PreTrainedModel = WaspForCausalLM(config).eval()
    save(reference, tmp_path)
    with pytest.raises(ModelError, match="wasp"):
        build(ModelConfig(path=str(tmp_path)))
    register(replace(family_of("llama"), name="wasp", model_types=("wasp",)))
    model, family = build(ModelConfig(path=str(tmp_path), dtype="float32"), attention=None)
    assert family.name == "wasp"
    fill(model, family, BaseWeights(tmp_path), lambda unit: None)
    with torch.no_grad():
        ids = examples()[0][None]
        torch.testing.assert_close(model.eval()(ids).logits, reference(ids).logits, atol=1e-5, rtol=1e-5)
