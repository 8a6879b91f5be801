"""Dense exports: the base's architecture, the trained model's logits, everything else byte for byte the base's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import LAYERS, recipe_for, selection_for, write_checkpoint
from support.exports import dense as export
from support.exports import start_of, tensors
from support.tiny_models import examples, save, tiny_model
from transformers import AutoModelForCausalLM

from lander_ds.export import dense
from lander_ds.inference.open import open_for_inference
from lander_ds.models.files import INDEX, SINGLE

FAMILIES = ("gemma3", "bloom", "opt", "gpt_neox", "llama")
METHODS = ("lander", "layers", "full", "lora", "shira")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", FAMILIES)
def test_logits_are_the_trained_models(case: str, method: str, tmp_path: Path) -> None:
    base = save(tiny_model(case), tmp_path / "base")
    recipe = recipe_for(base, tmp_path / "run", method, gate="none")
    write_checkpoint(recipe)
    exported = AutoModelForCausalLM.from_pretrained(export(recipe)).eval()
    assert exported.dtype == torch.float32
    ours = open_for_inference(start_of(recipe), "trained")
    original = AutoModelForCausalLM.from_pretrained(base).eval()
    for sequence in examples():
        with torch.no_grad(), ours.pair("en-de"):
            expected = ours.model(sequence[None]).logits
            actual = exported(sequence[None]).logits
            before = original(sequence[None]).logits
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
        assert (actual - before).abs().max() > 1e-2
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        with ours.pair("en-de"):
            translation = ours.model.generate(sequence[None], **options)
        assert torch.equal(exported.generate(sequence[None], **options), translation)


@pytest.mark.parametrize("case", ["gemma3", "bloom"])
def test_untrained_rows_and_tensors_are_the_bases(case: str, tmp_path: Path) -> None:
    base = save(tiny_model(case), tmp_path / "base")
    recipe = recipe_for(base, tmp_path / "run", gate="none")
    trained = write_checkpoint(recipe)
    before, after = tensors(base), tensors(export(recipe))
    assert list(after) == list(before)
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    layer_path = {"gemma3": "model.layers", "bloom": "transformer.h"}[case]
    assert changed
    assert all(any(f"{layer_path}.{layer}.mlp" in name for layer in LAYERS) for name in changed)
    for layer in selection_for(recipe).layers:
        for name in changed:
            if f"{layer_path}.{layer.layer}." not in name:
                continue
            dim = 1 if "down_proj" in name or "4h_to_h.weight" in name else 0
            for bank, neurons in zip(layer.banks, layer.slices(), strict=True):
                equal = torch.equal(
                    after[name].index_select(dim, neurons), before[name].index_select(dim, neurons)
                )
                assert equal == (bank.kind == "frozen"), (name, bank)
    # Trained values stand where the selection took the neurons from.
    first = selection_for(recipe).layers[0]
    up, role = {"gemma3": ("up_proj", "up"), "bloom": ("dense_h_to_4h", "up")}[case]
    [values] = [
        v for name, v in trained.items() if name.endswith(f"banks.0.{role}") and f".{first.layer}.mlp" in name
    ]
    name = f"{layer_path}.{first.layer}.mlp.{up}.weight"
    assert torch.equal(after[name][first.slices()[0]], values)


def test_the_shards_and_files_of_the_base_are_kept(tmp_path: Path) -> None:
    base = save(tiny_model("gemma3"), tmp_path / "base", max_shard_size="12KB")
    (base / "tokenizer.json").write_text("{}")
    (base / "notes.txt").write_text("not a part of the model")
    recipe = recipe_for(base, tmp_path / "run", gate="none")
    write_checkpoint(recipe)
    directory = export(recipe)
    assert len(list(directory.glob("*.safetensors"))) == len(list(base.glob("*.safetensors"))) > 2
    assert (directory / INDEX).read_bytes() == (base / INDEX).read_bytes()
    assert {path.name for path in base.iterdir()} - {path.name for path in directory.iterdir()} == {
        "notes.txt"
    }
    exported = AutoModelForCausalLM.from_pretrained(directory)
    assert exported.lm_head.weight is exported.model.embed_tokens.weight


def test_a_tied_head_that_is_stored_too_is_updated_too(tmp_path: Path) -> None:
    """transformers unties what differs on disk: a stale copy would become the head."""
    base = save(tiny_model("gemma3"), tmp_path / "base")
    both = load_file(base / SINGLE)
    both["lm_head.weight"] = both["model.embed_tokens.weight"].clone()
    save_file(both, base / SINGLE, metadata={"format": "pt"})
    recipe = recipe_for(base, tmp_path / "run", "full")
    trained = write_checkpoint(recipe)
    directory = export(recipe)
    after = tensors(directory)
    assert torch.equal(after["model.embed_tokens.weight"], trained["model.embed_tokens.weight"])
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    exported = AutoModelForCausalLM.from_pretrained(directory)
    assert exported.lm_head.weight is exported.model.embed_tokens.weight


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("stored", "option", "expected"),
    [
        ("bfloat16", None, torch.bfloat16),
        ("float32", torch.bfloat16, torch.bfloat16),
        ("bfloat16", torch.float32, torch.float32),
    ],
)
def test_types(
    tmp_path: Path, method: str, stored: str, option: torch.dtype | None, expected: torch.dtype
) -> None:
    base = save(tiny_model("llama").to(getattr(torch, stored)), tmp_path / "base")
    recipe = recipe_for(base, tmp_path / "run", method, gate="none")
    trained = write_checkpoint(recipe)
    directory = export(recipe, option)
    after = tensors(directory)
    assert {value.dtype for value in after.values()} == {expected}
    assert json.loads((directory / "config.json").read_text())["dtype"] == str(expected).removeprefix(
        "torch."
    )
    assert AutoModelForCausalLM.from_pretrained(directory).dtype == expected
    if method in ("full", "layers"):
        # Rounded once, from the float32 masters.
        assert all(torch.equal(after[name], value.to(expected)) for name, value in trained.items())


def test_gates_are_dropped(tmp_path: Path) -> None:
    base = save(tiny_model("llama"), tmp_path / "base")
    recipe = recipe_for(base, tmp_path / "run", gate="input")
    write_checkpoint(recipe)
    assert set(tensors(export(recipe))) == set(tensors(base))


def test_a_failed_export_leaves_the_older_one_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_for(save(tiny_model("llama"), tmp_path / "base"), tmp_path / "run", "full")
    write_checkpoint(recipe)
    directory = export(recipe)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dense, "copy_companions", full)
    with pytest.raises(OSError, match="No space left"):
        export(recipe, torch.bfloat16)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    assert not list(directory.parent.glob(".export*"))
