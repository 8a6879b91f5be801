"""Import, surgery, export: what was not trained comes out bit by bit as it went in, for every family and type."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.checkpoints import recipe_for, write_checkpoint
from support.exports import contents, dense, open_trained, tensors, trained_logits, untrained_checkpoint
from support.tiny_models import CONFIGS, examples, save, tiny_model
from transformers import AutoModelForCausalLM

from lander_ds.export.routed import export_routed
from lander_ds.export.writer import Form
from lander_ds.models.files import INDEX

TYPES = ("bfloat16", "float16", "float32")


def base_of(case: str, directory: Path, dtype: str = "float32") -> Path:
    """A tiny base with the small files that a model directory has."""
    base = save(tiny_model(case).to(getattr(torch, dtype)), directory)
    (base / "generation_config.json").write_text(json.dumps({"max_new_tokens": 7, "eos_token_id": 2}))
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "LICENSE"):
        (base / name).write_text(f"{name} of the base")
    return base


@pytest.mark.parametrize("case", CONFIGS)
def test_a_dense_export_without_training_is_the_base_byte_for_byte(case: str, tmp_path: Path) -> None:
    base = base_of(case, tmp_path / "base")
    recipe = recipe_for(base, tmp_path / "run")
    untrained_checkpoint(recipe)
    out = dense(recipe)
    before, after = tensors(base), tensors(out)
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    files = contents(base)
    files.pop("config.json")
    assert {name: data for name, data in contents(out).items() if name != "config.json"} == files


@pytest.mark.parametrize("case", CONFIGS)
def test_a_routed_export_computes_what_was_trained(case: str, tmp_path: Path) -> None:
    recipe = recipe_for(base_of(case, tmp_path / "base"), tmp_path / "run")
    write_checkpoint(recipe)
    export_routed(open_trained(recipe), tmp_path / "out", Form())
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    assert exported.generation_config.max_new_tokens == 7
    assert (tmp_path / "out" / "tokenizer.model").read_text() == "tokenizer.model of the base"
    with torch.no_grad():
        actual = [exported(ids[None], pair="en-de").logits for ids in examples()]
    for ours, theirs in zip(trained_logits(recipe, "en-de"), actual, strict=True):
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    embedding = exported.get_input_embeddings().weight
    tied = bool(CONFIGS[case]().tie_word_embeddings)
    assert (exported.get_output_embeddings().weight is embedding) == tied


@pytest.mark.parametrize("dtype", TYPES)
def test_untrained_exports_of_every_type_are_the_base(dtype: str, tmp_path: Path) -> None:
    base = base_of("gemma3", tmp_path / "base", dtype)
    recipe = recipe_for(base, tmp_path / "run")
    untrained_checkpoint(recipe)
    after = tensors(dense(recipe))
    assert {value.dtype for value in after.values()} == {getattr(torch, dtype)}
    assert all(torch.equal(after[name], value) for name, value in tensors(base).items())


@pytest.mark.parametrize("asked", TYPES)
@pytest.mark.parametrize("stored", TYPES)
def test_every_type_from_every_type(stored: str, asked: str, tmp_path: Path) -> None:
    base = base_of("llama-tied", tmp_path / "base", stored)
    recipe = recipe_for(base, tmp_path / "run")
    write_checkpoint(recipe)
    wanted = getattr(torch, asked)
    out = dense(recipe, wanted, shard_bytes=20_000)
    assert {value.dtype for value in tensors(out).values()} == {wanted}
    assert len(list(out.glob("*.safetensors"))) > 1
    export_routed(open_trained(recipe), tmp_path / "routed", Form(wanted, 20_000))
    assert {value.dtype for value in tensors(tmp_path / "routed").values()} == {wanted}
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == wanted
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_the_index_tells_the_size_of_another_type(tmp_path: Path) -> None:
    base = save(tiny_model("llama"), tmp_path / "base", max_shard_size="20KB")
    recipe = recipe_for(base, tmp_path / "run")
    untrained_checkpoint(recipe)
    before = json.loads((base / INDEX).read_text())
    after = json.loads((dense(recipe, torch.bfloat16) / INDEX).read_text())
    assert after["weight_map"] == before["weight_map"]
    assert after["metadata"]["total_size"] * 2 == before["metadata"]["total_size"]


def test_code_that_config_json_refers_to_comes_along(tmp_path: Path) -> None:
    base = base_of("llama", tmp_path / "base")
    recipe = recipe_for(base, tmp_path / "run")
    untrained_checkpoint(recipe)
    source = open_trained(recipe).source
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "own.Own"}}))
    (base / "own.py").write_text("class Own: ...")
    from lander_ds.export.dense import export_dense

    export_dense(source, tmp_path / "out", Form())
    assert (tmp_path / "out" / "own.py").read_text() == "class Own: ..."
