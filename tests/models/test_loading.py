"""From a directory on disk to a filled model: every way in which checkpoints name, tie and split tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.selections import random_selection
from support.tiny_models import CONFIGS, examples, laid_out, save, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lander_ds.common.errors import ArtefactError, ModelError
from lander_ds.config.recipe import ModelConfig
from lander_ds.config.schema.method import RoutingConfig
from lander_ds.models.family import Family
from lander_ds.models.files import INDEX, SINGLE
from lander_ds.models.loading import build, fill
from lander_ds.models.routed_ffn import Routing, routed
from lander_ds.models.span import units, whole
from lander_ds.models.surgery import install, slices
from lander_ds.models.weights import BaseWeights, base_fingerprint


def load(directory: Path, dtype: str = "float32") -> tuple[PreTrainedModel, Family]:
    """Built for generation and filled."""
    model, family = build(ModelConfig(path=str(directory), dtype=dtype), attention=None)  # type: ignore[arg-type]
    fill(model, family, BaseWeights(directory), lambda unit: None)
    return model.eval(), family


def rewrite(directory: Path, rename: Callable[[str], str]) -> None:
    """Store the tensors of a directory under other names."""
    tensors = load_file(directory / SINGLE)
    save_file({rename(name): tensor for name, tensor in tensors.items()}, directory / SINGLE)


def assert_same_logits(actual: PreTrainedModel, expected: PreTrainedModel) -> None:
    with torch.no_grad():
        for sequence in examples():
            torch.testing.assert_close(
                actual(sequence[None]).logits, expected(sequence[None]).logits, atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("case", CONFIGS)
def test_a_sharded_directory_gives_the_same_model(case: str, tmp_path: Path) -> None:
    reference = tiny_model(case)
    save(reference, tmp_path, max_shard_size="12KB")
    assert (tmp_path / INDEX).exists()
    model, _ = load(tmp_path)
    assert_same_logits(model, reference)
    expected = laid_out(case).state_dict()
    assert set(model.state_dict()) == set(expected)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("case", ["gemma3", "llama", "qwen2", "gpt_neox", "opt"])
def test_buffers_and_bfloat16_weights_are_what_from_pretrained_makes(case: str, tmp_path: Path) -> None:
    save(tiny_model(case), tmp_path)
    model, _ = load(tmp_path, "bfloat16")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    buffers = dict(expected.named_buffers())
    for name, buffer in model.named_buffers():
        assert buffer.dtype == buffers[name].dtype, name
        assert torch.equal(buffer, buffers[name]), name
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize("case", ["gemma3", "llama-tied", "qwen3", "bloom", "gpt_neox-serial", "opt"])
def test_tied_embeddings_are_one_parameter(case: str, tmp_path: Path) -> None:
    save(tiny_model(case), tmp_path)
    model, family = load(tmp_path)
    assert model.get_output_embeddings().weight is family.embeddings_of(model).weight


@pytest.mark.parametrize("case", ["llama", "gpt_neox", "bloom-post"])
def test_untied_embeddings_are_two_parameters(case: str, tmp_path: Path) -> None:
    save(tiny_model(case), tmp_path)
    model, family = load(tmp_path)
    assert not torch.equal(model.get_output_embeddings().weight, family.embeddings_of(model).weight)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("case", "rename"),
    [
        # As the hub has BLOOM and some OPT checkpoints: saved from the model without its head.
        ("bloom", lambda name: name.removeprefix("transformer.")),
        ("opt", lambda name: name.removeprefix("model.")),
        # Pythia.
        ("gpt_neox", lambda name: name.replace("lm_head.", "embed_out.")),
        # Language models saved as a part of a multimodal one, by older and newer versions.
        ("gemma3", lambda name: f"language_model.{name}"),
        ("gemma3", lambda name: name.replace("model.", "model.language_model.", 1)),
        ("gemma3", lambda name: f"model.language_model.{name}"),
    ],
)
def test_tensors_are_found_under_their_other_names(
    case: str, rename: Callable[[str], str], tmp_path: Path
) -> None:
    reference = tiny_model(case)
    save(reference, tmp_path)
    rewrite(tmp_path, rename)
    model, _ = load(tmp_path)
    assert_same_logits(model, reference)


def test_the_text_part_of_a_multimodal_directory_is_used(tmp_path: Path) -> None:
    reference = tiny_model("gemma3")
    save(reference, tmp_path)
    rewrite(tmp_path, lambda name: f"language_model.{name}")
    text = json.loads((tmp_path / "config.json").read_text())
    config = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": text,
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 8, "num_attention_heads": 2},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, family = load(tmp_path)
    assert family.name == "gemma3"
    assert_same_logits(model, reference)


@pytest.mark.parametrize("case", ["gemma3", "gpt_neox", "opt-350m", "bloom"])
def test_every_parameter_is_placed_exactly_once(case: str, tmp_path: Path) -> None:
    save(tiny_model(case), tmp_path)
    model, family = build(ModelConfig(path=str(tmp_path), dtype="float32"))
    placed: list[nn.Parameter] = []

    def placement(unit: nn.Module) -> None:
        assert not any(parameter.is_meta for parameter in unit.parameters())
        placed.extend(unit.parameters())

    fill(model, family, BaseWeights(tmp_path), placement)
    assert len({id(parameter) for parameter in placed}) == len(placed)
    assert {id(parameter) for parameter in placed} == {id(parameter) for parameter in model.parameters()}
    names = [name for name, _ in units(model, family, whole(model, family))]
    assert len(set(names)) == len(names)
    assert sum(name.startswith(f"{family.decoder}.{family.layers}.") for name in names) == 3


@pytest.mark.parametrize("case", CONFIGS)
def test_a_model_cut_on_meta_is_filled_with_the_same_banks(case: str, tmp_path: Path) -> None:
    reference = tiny_model(case)
    save(reference, tmp_path)
    model, family = build(ModelConfig(path=str(tmp_path), dtype="float32"), attention=None)
    neurons = family.neurons(model)
    selection = random_selection(neurons, (0, 2))
    install(model, family, selection, RoutingConfig(hidden=8), seed=5)
    names = list(slices(model))
    fill(model, family, BaseWeights(tmp_path), lambda unit: None)
    assert list(slices(model)) == names
    with routed(Routing(torch.tensor(1))):
        assert_same_logits(model.eval(), reference)
    reference = laid_out(case)
    install(reference, family, selection, RoutingConfig(hidden=8), seed=5)
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
        assert parameter.requires_grad == (".router." in name), name


def test_a_tensor_that_several_banks_share_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tiny_model("llama"), tmp_path)
    model, family = build(ModelConfig(path=str(tmp_path), dtype="float32"))
    install(model, family, random_selection(48, (1,)), RoutingConfig(), seed=1)
    weights = BaseWeights(tmp_path)
    read = weights.read
    asked: list[str] = []
    monkeypatch.setattr(weights, "read", lambda name: (asked.append(name), read(name))[1])
    fill(model, family, weights, lambda unit: None)
    assert sorted(asked) == sorted(weights.names())


def test_trained_values_take_the_place_of_the_base(tmp_path: Path) -> None:
    save(tiny_model("gpt_neox"), tmp_path)
    model, family = build(ModelConfig(path=str(tmp_path), dtype="bfloat16"))
    install(model, family, random_selection(48, (1,)), RoutingConfig(hidden=8), seed=1)
    shapes = {
        name: parameter.shape
        for name, parameter in model.named_parameters()
        if ".banks.0." in name or ".router." in name
    }
    trained = {name: torch.randn(shape) for name, shape in shapes.items()}
    fill(model, family, BaseWeights(tmp_path), lambda unit: None, trained)
    base = load_file(tmp_path / SINGLE)
    cuts = slices(model)
    for name, parameter in model.named_parameters():
        if name in trained:
            assert torch.equal(parameter, trained[name].to(torch.bfloat16)), name
        elif name in cuts:
            cut = cuts[name]
            assert torch.equal(parameter, base[cut.tensor].index_select(cut.dim, cut.neurons).bfloat16()), (
                name
            )


@pytest.mark.parametrize("misfit", [{"model.layers.9.weight": (3,)}, {"model.norm.weight": (3,)}])
def test_trained_values_that_fit_nothing_are_refused(misfit: dict[str, tuple[int]], tmp_path: Path) -> None:
    save(tiny_model("llama"), tmp_path)
    model, family = build(ModelConfig(path=str(tmp_path)))
    trained = {name: torch.zeros(shape) for name, shape in misfit.items()}
    with pytest.raises(ArtefactError, match=next(iter(misfit))):
        fill(model, family, BaseWeights(tmp_path), lambda unit: None, trained)


def test_float16_that_overflows_is_refused(tmp_path: Path) -> None:
    reference = tiny_model("llama")
    reference.model.norm.weight.data[3] = 1e6
    save(reference, tmp_path)
    model, family = build(ModelConfig(path=str(tmp_path), dtype="float16"))
    with pytest.raises(ModelError, match=r"model\.norm\.weight holds NaN or infinity in torch.float16"):
        fill(model, family, BaseWeights(tmp_path), lambda unit: None)


def test_fingerprint_follows_weights_and_config_but_not_the_library_version(tmp_path: Path) -> None:
    save(tiny_model("llama"), tmp_path)
    first = base_fingerprint(tmp_path)
    assert first.startswith("sha256:content:")
    assert len(first) == len("sha256:content:") + 64
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "transformers_version": "0"}))
    assert base_fingerprint(tmp_path) == first
    path.write_text(json.dumps({**config, "rms_norm_eps": 1.0}))
    assert base_fingerprint(tmp_path) != first
    path.write_text(json.dumps(config))
    rewrite(tmp_path, lambda name: name)
    tensors = load_file(tmp_path / SINGLE)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, tmp_path / SINGLE)
    assert base_fingerprint(tmp_path) != first
