"""Routed exports of several families, opened as a user opens them, against the trained model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from support.checkpoints import PAIRS, recipe_for, shape, write_checkpoint
from support.exports import open_trained, start_of
from support.tiny_models import VOCABULARY, save, tiny_model

from lander_ds.checkpoint import checkpoint
from lander_ds.common.errors import ConfigError
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.recipe import Recipe
from lander_ds.export import routed
from lander_ds.export.routed import export_routed
from lander_ds.export.writer import Form
from lander_ds.inference.open import InferenceModel, open_for_inference
from lander_ds.models.files import INDEX

PROGRAM = Path(__file__).parents[1] / "support" / "open_routed.py"
CASES = {
    "gemma3": "gemma3",  # gated, tied, sliding windows
    "gemma2": "gemma2",  # final softcap
    "bloom": "bloom",  # biases, the FFN adds the residual itself
    "gpt_neox": "gpt_neox",  # biases, untied, other names on disk
    "opt": "opt",  # biases, the FFN is spread in the layer
    "qwen3": "qwen3",
    "output": "llama",  # gate at the output, other pairs masked
    "none": "llama",
    "shards": "gemma3",
}
"""Name -> family case of support/tiny_models."""


@dataclass(frozen=True)
class Exported:
    """An export and what it was made from."""

    recipe: Recipe
    directory: Path
    actual: dict[str, Any]


def prompts() -> dict[str, list[int]]:
    generator = torch.Generator().manual_seed(6)
    return {
        pair: torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        for pair, length in zip((*PAIRS, "none"), (9, 6, 4, 7), strict=True)
    }


def make(name: str, root: Path) -> Recipe:
    base = save(tiny_model(CASES[name]), root / name / "base")
    (base / "generation_config.json").write_text(
        json.dumps({"max_new_tokens": 5, "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1})
    )
    recipe = recipe_for(base, root / name / "run", gate="none" if name == "none" else "input")
    if name == "output":
        recipe = replace(recipe, routing=replace(recipe.routing, gate="output", other_pairs="mask"))
    write_checkpoint(recipe)
    return recipe


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """All cases, exported here and opened together in one process without this package."""
    root = tmp_path_factory.mktemp("routed")
    recipes, wanted = {}, {}
    for name in CASES:
        recipe = recipes[name] = make(name, root)
        run = RunDirectory(recipe.run_dir)
        form = Form(shard_bytes=8000) if name == "shards" else Form()
        export_routed(open_trained(recipe), run.export, form)
        wanted[name] = {
            "directory": str(run.export),
            "prompts": prompts(),
            "save": str(root / "saved") if name == "gemma3" else None,
        }
    actual = open_elsewhere(root, wanted)
    return {name: Exported(recipes[name], Path(wanted[name]["directory"]), actual[name]) for name in CASES}  # type: ignore[arg-type]


def open_elsewhere(root: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    (root / "wanted.json").write_text(json.dumps(wanted))
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(root / "wanted.json"), str(root / "found.pt")],
        env={**os.environ, "HF_MODULES_CACHE": str(root / "modules"), "OMP_NUM_THREADS": "1"},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    actual: dict[str, Any] = torch.load(root / "found.pt")
    return actual


def trained(exported: Exported) -> InferenceModel:
    return open_for_inference(start_of(exported.recipe), "trained")


@pytest.mark.parametrize("name", CASES)
def test_logits_and_translations_are_the_trained_models(exports: dict[str, Exported], name: str) -> None:
    exported = exports[name]
    ours = trained(exported)
    logits = []
    for pair, ids in prompts().items():
        prompt = torch.tensor([ids])
        options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 12, "do_sample": False}
        with torch.no_grad(), ours.pair(pair):
            expected = ours.model(prompt).logits
            greedy = ours.model.generate(prompt, **options)
        torch.testing.assert_close(exported.actual["logits"][pair], expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(exported.actual["greedy"][pair], greedy), pair
        logits.append(expected[0, 0])
    assert expected.std() > 0.1


@pytest.mark.parametrize("name", CASES)
def test_the_trained_values_are_in_it(exports: dict[str, Exported], name: str) -> None:
    """Banks, gates and pairs all matter: the base, another pair or forgotten gates would show."""
    exported = exports[name]
    ids = torch.tensor([prompts()["en-de"]])
    base = open_for_inference(start_of(exported.recipe), "base")
    ours = trained(exported)
    actual = exported.actual["logits"]["en-de"]
    with torch.no_grad():
        assert (base.model(ids).logits - actual).abs().max() > 1e-3
        if name != "none":
            with ours.pair("en-fr"):
                assert (ours.model(ids).logits - actual).abs().max() > 1e-4


@pytest.mark.parametrize("name", CASES)
def test_a_batch_may_mix_pairs(exports: dict[str, Exported], name: str) -> None:
    actual = exports[name].actual
    for row, (pair, ids) in enumerate(prompts().items()):
        for single, mixed in (("greedy", "mixed"), ("beams", "mixed_beams")):
            expected = actual[single][pair][0, len(ids) :]
            assert torch.equal(actual[mixed][row, : len(expected)], expected), (single, pair)


@pytest.mark.parametrize("name", CASES)
def test_the_pair_must_be_named_and_known(exports: dict[str, Exported], name: str) -> None:
    actual = exports[name].actual
    listed = ", ".join(PAIRS)
    assert actual["no_pair"] == f"say which language pair: pair=..., one of {listed}, or none"
    assert actual["no_pair_generate"] == actual["no_pair"]
    assert (
        actual["unknown_pair"]
        == f"unknown pair 'en-xx': this model knows {listed}, and 'none' for every other direction"
    )


def test_it_opens_by_the_auto_classes(exports: dict[str, Exported]) -> None:
    for exported in exports.values():
        assert exported.actual["config"] == "LanderConfig"
        assert exported.actual["dtypes"] == ["torch.float32"]
        assert exported.actual["limit"] == 5, "generation_config.json of the base counts"


def test_tied_embeddings_are_stored_once_and_stay_tied(exports: dict[str, Exported]) -> None:
    exported = exports["gemma3"]
    model, _ = shape(exported.recipe, selection_of(exported))
    assert exported.actual["parameters"] == sum(p.numel() for p in model.parameters())
    assert not any("lm_head" in name for name in stored(exported.directory))


def selection_of(exported: Exported) -> Any:
    return checkpoint.newest(RunDirectory(exported.recipe.run_dir).checkpoints).selection()


def stored(directory: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return tensors


def test_a_user_may_save_it_again(exports: dict[str, Exported]) -> None:
    actual = exports["gemma3"].actual
    assert torch.equal(actual["resaved"], actual["logits"]["en-de"])


def test_many_shards(exports: dict[str, Exported]) -> None:
    directory = exports["shards"].directory
    index = json.loads((directory / INDEX).read_text())
    shards = sorted(directory.glob("*.safetensors"))
    assert len(shards) > 5
    assert {path.name for path in shards} == set(index["weight_map"].values())
    tensors = stored(directory)
    assert set(tensors) == set(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert not (directory / "model.safetensors").exists()
    single = stored(exports["gemma3"].directory)
    assert all(torch.equal(single[name], tensor) for name, tensor in tensors.items())


def test_it_is_a_directory_of_its_own(exports: dict[str, Exported]) -> None:
    directory = exports["gemma3"].directory
    assert {path.name for path in directory.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("experts.py", "joined.py", "modeling_lander.py", "routed_ffn.py"),
    }
    text = (directory / "config.json").read_text()
    assert str(exports["gemma3"].recipe.model.path) not in text, "no path of this machine"


@pytest.mark.parametrize(
    ("stored_as", "option", "expected"),
    [
        ("float32", None, torch.float32),
        ("bfloat16", None, torch.bfloat16),
        ("float32", torch.bfloat16, torch.bfloat16),
        ("bfloat16", torch.float32, torch.float32),
    ],
)
def test_types(tmp_path: Path, stored_as: str, option: torch.dtype | None, expected: torch.dtype) -> None:
    base = save(tiny_model("llama").to(getattr(torch, stored_as)), tmp_path / "base")
    recipe = recipe_for(base, tmp_path / "run")
    tensors = write_checkpoint(recipe)
    run = RunDirectory(recipe.run_dir)
    export_routed(open_trained(recipe), run.export, Form(option))
    actual = stored(run.export)
    gates = {name for name in actual if ".router." in name}
    assert {actual[name].dtype for name in set(actual) - gates} == {expected}
    # Gates have no type on disk to keep; they keep that of the training.
    assert {actual[name].dtype for name in gates} == {option or torch.float32}
    for name, value in tensors.items():
        # Rounded once, from the float32 masters.
        assert torch.equal(actual[f"model.{name}"], value.to(actual[f"model.{name}"].dtype))


def test_other_methods_have_no_routed_form(tmp_path: Path) -> None:
    recipe = recipe_for(save(tiny_model("llama"), tmp_path / "base"), tmp_path / "run", "layers")
    write_checkpoint(recipe)
    run = RunDirectory(recipe.run_dir)
    trained_model = open_trained(recipe)
    with pytest.raises(ConfigError, match=r"method layers: use export\.formats: \[dense\]"):
        export_routed(trained_model, run.export, Form())
    assert not run.export.exists()


def test_a_failed_export_leaves_the_older_one_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_llama(tmp_path)
    run = RunDirectory(recipe.run_dir)
    trained_model = open_trained(recipe)
    target = run.export / "routed"
    export_routed(trained_model, target, Form())
    before = {path.name: path.read_bytes() for path in target.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(routed, "copy_companions", full)
    with pytest.raises(OSError, match="No space left"):
        export_routed(trained_model, target, Form(torch.bfloat16))
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in run.export.iterdir()] == ["routed"]


def make_llama(root: Path) -> Recipe:
    recipe = recipe_for(save(tiny_model("llama"), root / "base"), root / "run")
    write_checkpoint(recipe)
    return recipe
