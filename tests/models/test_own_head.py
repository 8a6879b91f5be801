"""A head that the files hold, where config.json says that it is tied to the embedding: what transformers computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import recipe_for, write_checkpoint
from support.exports import logits, open_trained, trained_logits
from support.tiny_models import examples, save, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from lander_ds.cli.main import main
from lander_ds.common.errors import ModelError
from lander_ds.config.recipe import ModelConfig
from lander_ds.export.delta_write import export_delta
from lander_ds.export.dense import export_dense
from lander_ds.export.routed import export_routed
from lander_ds.export.writer import Form
from lander_ds.models.files import SINGLE
from lander_ds.models.loading import build, fill, tied_parameters
from lander_ds.models.weights import BaseWeights

FAMILIES = ("llama", "bloom", "gpt_neox", "opt", "gemma3")
FACTS = {"base": {"name": "base", "fingerprint": "sha256:0"}, "method": "lander"}


def head_of(directory: Path) -> tuple[str, str]:
    """Names on disk of the head and of the embedding."""
    names = list(load_file(directory / SINGLE))
    [embedding] = [
        n for n in names if n.endswith(("embed_tokens.weight", "word_embeddings.weight", "embed_in.weight"))
    ]
    return ("embed_out.weight" if "gpt_neox" in embedding else "lm_head.weight"), embedding


def with_head(directory: Path, case: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A base that says its head is tied, and holds one that `change` makes of the embedding."""
    save(tiny_model(case), directory)
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    head, embedding = head_of(directory)
    tensors = load_file(directory / SINGLE)
    save_file(
        {**tensors, head: change(tensors[embedding]).contiguous()},
        directory / SINGLE,
        metadata={"format": "pt"},
    )
    return directory


def other(embedding: torch.Tensor) -> torch.Tensor:
    return embedding.flip(0) * 1.5


def ours(directory: Path) -> Any:
    model, family = build(ModelConfig(str(directory), dtype="float32"), attention=None)
    fill(model, family, BaseWeights(directory), lambda unit: None)
    return model.eval()


def assert_same(actual: Any, expected: Any) -> None:
    with torch.no_grad():
        for ids in examples():
            torch.testing.assert_close(
                actual(ids[None]).logits, expected(ids[None]).logits, rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("case", FAMILIES)
def test_a_head_of_its_own_is_used(tmp_path: Path, case: str) -> None:
    base = with_head(tmp_path / "base", case, other)
    model = ours(base)
    assert not tied_parameters(model)
    assert_same(model, AutoModelForCausalLM.from_pretrained(base).eval())


@pytest.mark.parametrize("case", FAMILIES)
def test_an_equal_head_stays_tied(tmp_path: Path, case: str) -> None:
    base = with_head(tmp_path / "base", case, torch.Tensor.clone)
    model = ours(base)
    assert tied_parameters(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert_same(model, AutoModelForCausalLM.from_pretrained(base).eval())


@pytest.mark.parametrize("method", ["lander", "full"])
def test_exports_keep_the_head(tmp_path: Path, method: str) -> None:
    base = with_head(tmp_path / "base", "llama", other)
    recipe = recipe_for(base, tmp_path / "run", method, gate="none")
    write_checkpoint(recipe)
    expected = trained_logits(recipe, "en-de")
    export_dense(open_trained(recipe).source, tmp_path / "dense", Form())
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    torch.testing.assert_close(logits(dense), expected, rtol=1e-5, atol=1e-5)
    if method == "full":
        return
    export_routed(open_trained(recipe), tmp_path / "routed", Form())
    routed = AutoModelForCausalLM.from_pretrained(tmp_path / "routed", trust_remote_code=True).eval()
    torch.testing.assert_close(logits(routed, "en-de"), expected, rtol=1e-5, atol=1e-5)


def test_a_delta_leads_there_and_back(tmp_path: Path) -> None:
    base = with_head(tmp_path / "base", "llama", other)
    recipe = recipe_for(base, tmp_path / "run", "lander")
    write_checkpoint(recipe)
    export_delta(open_trained(recipe), tmp_path / "delta", {}, FACTS)
    paths = [str(tmp_path / name) for name in ("base", "delta", "routed", "back")]
    assert main(["delta", "apply", *paths[:3]]) == 0
    assert main(["delta", "revert", paths[2], paths[1], paths[3]]) == 0
    assert (tmp_path / "back" / SINGLE).read_bytes() == (base / SINGLE).read_bytes()


VISION = {
    **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"image_size": 8, "patch_size": 4},
}
WRAPPERS: dict[str, dict[str, Any]] = {
    "llava": {"vision_config": {**VISION, "model_type": "clip_vision_model", "projection_dim": 16}},
    "mistral3": {
        "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 8},
        "spatial_merge_size": 1,
    },
}
Head = Callable[[torch.Tensor], torch.Tensor] | None


def wrapped(directory: Path, kind: str, outside: bool, inside: bool, head: Head) -> Path:
    """A tiny multimodal model whose configurations tie the head as said, with a head that `head` makes, or none."""
    text = tiny_model("llama" if kind == "llava" else "mistral").config.to_dict() | {
        "tie_word_embeddings": False
    }
    config = AutoConfig.for_model(
        kind, **WRAPPERS[kind], text_config=text, image_token_index=3, tie_word_embeddings=False
    )
    torch.manual_seed(2)
    AutoModelForImageTextToText.from_config(config).save_pretrained(directory)
    tensors = load_file(directory / SINGLE)
    [name] = [name for name in tensors if name.endswith("lm_head.weight")]
    [embedding] = [values for key, values in tensors.items() if key.endswith("embed_tokens.weight")]
    tensors.pop(name)
    if head is not None:
        tensors[name] = head(embedding).contiguous()
    save_file(tensors, directory / SINGLE, metadata={"format": "pt"})
    path = directory / "config.json"
    content = json.loads(path.read_text())
    content["tie_word_embeddings"] = outside
    content["text_config"]["tie_word_embeddings"] = inside
    path.write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize("head", [other, torch.Tensor.clone, None])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("kind", WRAPPERS)
def test_multimodal_models_are_tied_as_transformers_ties_them(
    tmp_path: Path, kind: str, outside: bool, inside: bool, head: Head
) -> None:
    base = wrapped(tmp_path / "base", kind, outside, inside, head)
    # LLaVA's outer configuration follows the inner one.
    tied = outside or (inside and kind == "llava")
    if head is None and not tied:
        message = (
            r"write tie_word_embeddings: true at the outer" if inside else r"lacks the tensor lm_head\.weight"
        )
        with pytest.raises(ModelError, match=message):
            ours(base)
        return
    model = ours(base)
    assert bool(tied_parameters(model)) == (tied and head is not other)
    assert_same(model, AutoModelForImageTextToText.from_pretrained(base).eval())
