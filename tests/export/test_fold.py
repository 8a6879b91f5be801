"""Folding gates: exact where the gate is a constant, and of the right banks for the right pair."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import LAYERS, PAIRS, recipe_for
from support.exports import logits, open_trained, rewrite_checkpoint, tensors, trained_logits
from support.tiny_models import save, tiny_model
from transformers import AutoModelForCausalLM

from lander_ds.common.errors import ArtefactError
from lander_ds.config.recipe import Recipe
from lander_ds.export.dense import export_dense
from lander_ds.export.fold import MEAN, folded, folds_of, mean_gates
from lander_ds.export.writer import Form
from lander_ds.training.progress import GATE_STEPS, Progress

LOGIT = 0.7


def constant(recipe: Recipe) -> dict[str, dict[str, float]]:
    """A checkpoint whose gates are the same number for every token; returns it by layer and pair."""

    def set_gates(values: dict[str, torch.Tensor]) -> None:
        for name, tensor in values.items():
            if name.endswith("router.w2"):
                tensor.zero_()
            elif name.endswith("router.b2"):
                tensor.fill_(LOGIT)

    rewrite_checkpoint(recipe, set_gates)
    c = float(torch.sigmoid(torch.tensor(LOGIT)))
    return {str(layer): dict.fromkeys(PAIRS, c) for layer in LAYERS}


def fold(recipe: Recipe, means: dict[str, dict[str, float]], pair: str, out: Path) -> Path:
    export_dense(folded(open_trained(recipe), means, pair), out, Form())
    return out


@pytest.mark.parametrize("case", ["gemma3", "bloom", "opt", "gpt_neox", "mixtral-moe"])
@pytest.mark.parametrize(
    ("gate", "init", "other"),
    [
        ("input", "preserve", "keep"),
        ("input", "paper", "mask"),
        ("output", "preserve", "mask"),
        ("output", "paper", "keep"),
        ("none", "preserve", "mask"),
    ],
)
def test_a_constant_gate_folds_exactly(case: str, gate: str, init: str, other: str, tmp_path: Path) -> None:
    recipe = recipe_for(save(tiny_model(case), tmp_path / "base"), tmp_path / "run", gate=gate)
    recipe = replace(recipe, routing=replace(recipe.routing, gate_init=init, other_pairs=other))  # type: ignore[arg-type]
    means = constant(recipe)
    for pair in ("en-de", "de-en"):
        out = fold(recipe, means, pair, tmp_path / pair)
        actual = logits(AutoModelForCausalLM.from_pretrained(out).eval())
        for theirs, ours in zip(actual, trained_logits(recipe, pair), strict=True):
            torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
    first, second = tensors(tmp_path / "en-de"), tensors(tmp_path / "de-en")
    assert any(not torch.equal(first[name], second[name]) for name in first), "pairs own different banks"


def test_mean_is_the_mean_factor_of_every_bank(tmp_path: Path) -> None:
    recipe = recipe_for(save(tiny_model("llama"), tmp_path / "base"), tmp_path / "run")
    constant(recipe)
    means = {str(layer): {"en-de": 0.2, "en-fr": 0.5, "de-en": 0.8} for layer in LAYERS}
    built = {pair: tensors(fold(recipe, means, pair, tmp_path / pair)) for pair in (*PAIRS, MEAN)}
    name = f"model.layers.{LAYERS[0]}.mlp.up_proj.weight"
    expected = torch.stack([built[pair][name] for pair in PAIRS]).mean(0)
    torch.testing.assert_close(built[MEAN][name], expected)
    assert not torch.equal(built["en-de"][name], built["de-en"][name])
    untouched = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(built[MEAN][untouched], tensors(Path(recipe.model.path))[untouched])


def test_hard_gates_are_rounded(tmp_path: Path) -> None:
    recipe = recipe_for(save(tiny_model("llama"), tmp_path / "base"), tmp_path / "run")
    recipe = replace(recipe, routing=replace(recipe.routing, gate_init="paper", gate_eval="hard"))
    means = constant(recipe)
    actual = logits(
        AutoModelForCausalLM.from_pretrained(fold(recipe, means, "en-de", tmp_path / "out")).eval()
    )
    for theirs, ours in zip(actual, trained_logits(recipe, "en-de"), strict=True):
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


def test_values_are_rounded_once(tmp_path: Path) -> None:
    """From float32 masters times the factor, not from a bfloat16 product."""
    base = save(tiny_model("llama").to(torch.bfloat16), tmp_path / "base")
    recipe = recipe_for(base, tmp_path / "run")
    means = constant(recipe)
    trained = open_trained(recipe)
    narrow = tensors(fold(recipe, means, "en-de", tmp_path / "narrow"))
    wide = folded(trained, means, "en-de")
    for name in wide.changed():
        assert torch.equal(narrow[name], wide.tensor(name, torch.float32).to(torch.bfloat16)), name


def test_mean_gates_come_from_the_last_steps_up_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines: list[dict[str, Any]] = [
        {"step": step, "gates": {"2": {"en-de": step / 100}}} for step in range(1, 51)
    ]
    lines.insert(3, {"step": 3, "valid_loss": {}})
    lines[10]["gates"]["2"]["en-fr"] = 0.25
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 51, "ga')
    last = [step / 100 for step in range(1, 41)][-GATE_STEPS:]
    expected = {"2": {"en-de": pytest.approx(sum(last) / len(last)), "en-fr": 0.25}}
    old: dict[str, Any] = {"step": 40, "progress": {"done": 40}}
    assert mean_gates(old, path) == expected
    assert mean_gates(old, tmp_path / "none") == {}
    progress = Progress(done=40)
    for line in lines[:41]:
        progress.gated(line.get("gates", {}))
    state = json.loads(json.dumps({"step": 40, "progress": progress.as_json()}))
    assert mean_gates(state, tmp_path / "none") == expected


@pytest.mark.parametrize("worthless", [float("nan"), float("inf")])
def test_gates_of_skipped_steps_do_not_count(tmp_path: Path, worthless: float) -> None:
    path = tmp_path / "metrics.jsonl"
    values = (0.25, worthless, 0.75)
    records = [{"step": step, "gates": {"2": {"en-de": value}}} for step, value in enumerate(values, 1)]
    path.write_text("\n".join(map(json.dumps, records)))
    assert mean_gates({"step": 3}, path) == {"2": {"en-de": 0.5}}


def test_what_cannot_be_folded_is_refused(tmp_path: Path) -> None:
    recipe = recipe_for(save(tiny_model("llama"), tmp_path / "base"), tmp_path / "run")
    means = constant(recipe)
    trained = open_trained(recipe)
    with pytest.raises(ArtefactError, match=r"no pair en-xx: fold one of en-de, en-fr, de-en, or mean"):
        folds_of(trained, ["en-xx"])
    del means["2"]["en-fr"]
    with pytest.raises(ArtefactError, match=r"no mean gate value of en-fr in layer 2"):
        folded(trained, means, "en-fr")
    ungated = recipe_for(Path(recipe.model.path), tmp_path / "ungated", gate="none")
    rewrite_checkpoint(ungated, lambda _: None)
    with pytest.raises(ArtefactError, match="nothing to fold"):
        folds_of(open_trained(ungated), ["en-de"])
