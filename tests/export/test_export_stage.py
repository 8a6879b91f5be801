"""Stage export on trainings that really ran: it writes, proves and skips."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.exports import contents, rewrite, tensors
from support.tiny_run import PAIRS, TinyRun
from support.training_runs import JOBS

from lander_ds.cli.main import main
from lander_ds.common.errors import ArtefactError, ConfigError
from lander_ds.common.files import write_json
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.recipe import Recipe
from lander_ds.export.sources import Merged
from lander_ds.models.files import SINGLE
from lander_ds.stages import export

pytestmark = pytest.mark.distributed

OVERRIDES = {job.name: job.overrides for job in JOBS[2]}


def copy_of(runs: TinyRun, name: str, target: Path, *overrides: str) -> tuple[Recipe, RunDirectory]:
    """(recipe, run directory) of a finished training, copied so that tests do not share exports."""
    shutil.copytree(runs.root / f"{name}-2", target)
    recipe = runs.recipe(f"{name}-2", *OVERRIDES[name], *overrides)
    return replace(recipe, run_dir=str(target)), RunDirectory(target)


@pytest.mark.parametrize(
    ("name", "formats"),
    [
        ("none", ["dense", "routed"]),
        ("input", ["dense", "routed"]),
        ("output", ["routed"]),
        ("full", ["dense"]),
        ("layers", ["dense"]),
        ("lora", ["dense"]),
        ("shira", ["dense"]),
    ],
)
def test_exports_compute_what_was_trained(
    world_2: TinyRun, tmp_path: Path, name: str, formats: list[str]
) -> None:
    recipe, run = copy_of(world_2, name, tmp_path / "run", f"export.formats={formats}")
    export.run(recipe, run)
    proof = json.loads((run.export / "verification.json").read_text())
    assert set(proof) == set(formats)
    for kind, actual in proof.items():
        assert actual["sentences"] == 2 * len(PAIRS)
        exact = not (kind == "dense" and name == "input")
        assert actual["expected_exact"] == exact
        if exact:
            assert actual["max_logit_difference"] < 1e-5 * max(1.0, actual["max_logit"])
            assert actual["same_greedy"]
        else:
            assert actual["max_logit_difference"] > 1e-3, "gates have been dropped"
        assert (run.export / kind / "tokenizer.json").exists()


def test_all_forms_of_a_gated_model(world_2: TinyRun, tmp_path: Path) -> None:
    recipe, run = copy_of(
        world_2,
        "input",
        tmp_path / "run",
        "export.formats=[dense, routed, delta]",
        "export.fold=[en-de, mean]",
        "export.fold_sentences=4",
        "translate.max_new_tokens=8",
        "score.bootstrap_samples=10",
    )
    export.run(recipe, run)
    proof = json.loads((run.export / "verification.json").read_text())
    assert set(proof) == {"dense", "routed", "delta", "dense-en-de", "dense-mean"}
    assert proof["delta"]["reversible"]
    assert not proof["dense-en-de"]["expected_exact"]
    assert proof["dense-en-de"]["sentences"] == 2, "of its own pair"
    # What folding costs: measured on the same sentences, and said in the card.
    [(pair, loss)] = proof["dense-en-de"]["loss"].items()
    assert (pair, loss["split"], loss["sentences"]) == ("en-de", "test", 4)
    for metric in ("bleu", "chrf"):
        actual = loss[metric]
        assert actual["difference"] == pytest.approx(actual["folded"] - actual["routed"])
        assert loss["signatures"][metric]
    assert set(proof["dense-mean"]["loss"]) == set(PAIRS)
    cards = {path.parent.name: path.read_text() for path in run.export.glob("*/README.md")}
    assert set(cards) == set(proof)
    assert f"| en-de | test | 4 | chrF2 | {loss['chrf']['routed']:.2f} |" in cards["dense-en-de"]
    assert "Measured against" not in cards["routed"]
    # The delta is the same model, there and back.
    base, delta = recipe.model.path, str(run.export / "delta")
    assert main(["delta", "apply", base, delta, str(tmp_path / "routed")]) == 0
    assert model_files(tmp_path / "routed") == model_files(run.export / "routed")
    assert main(["delta", "revert", str(tmp_path / "routed"), delta, str(tmp_path / "base")]) == 0
    assert tensors(tmp_path / "base").keys() == tensors(Path(base)).keys()
    assert (tmp_path / "base" / SINGLE).read_bytes() == (Path(base) / SINGLE).read_bytes()
    assert main(["delta", "apply", base, delta, str(tmp_path / "folded"), "--fold", "mean"]) == 0
    assert model_files(tmp_path / "folded") == model_files(run.export / "dense-mean")


def model_files(directory: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(directory).items() if name != "README.md"}


@pytest.mark.parametrize("name", ["full", "lora", "none"])
def test_deltas_of_the_other_methods(world_2: TinyRun, tmp_path: Path, name: str) -> None:
    recipe, run = copy_of(world_2, name, tmp_path / "run", "export.formats=[dense, delta]", "export.verify=1")
    export.run(recipe, run)
    base, delta = recipe.model.path, str(run.export / "delta")
    assert main(["delta", "apply", base, delta, str(tmp_path / "dense")]) == 0
    assert model_files(tmp_path / "dense") == model_files(run.export / "dense")


def test_masked_banks_without_gates_are_not_called_exact(world_2: TinyRun, tmp_path: Path) -> None:
    """They compute something else for every pair, which only the fold of a pair can hold."""
    recipe, run = copy_of(
        world_2,
        "none",
        tmp_path / "run",
        "export.formats=[dense]",
        "export.fold=[en-fr]",
        "export.fold_sentences=0",
    )
    rewrite(run, lambda tensors: None, routing={"other_pairs": "mask"})
    export.run(recipe, run)
    proof = json.loads((run.export / "verification.json").read_text())
    assert not proof["dense"]["expected_exact"]
    assert proof["dense"]["max_logit_difference"] > 1e-3
    assert proof["dense-en-fr"]["expected_exact"]
    assert "loss" not in proof["dense-en-fr"]


def test_new_scores_make_new_cards(world_2: TinyRun, tmp_path: Path) -> None:
    recipe, run = copy_of(world_2, "none", tmp_path / "run", "export.verify=0")
    export.run(recipe, run)
    card = run.export / "routed" / "README.md"
    assert "Not measured" in card.read_text()
    pairs = {pair: {"systems": {"trained": {"bleu": 12.0}}} for pair in PAIRS}
    write_json(run.scores, {"baseline": None, "pairs": pairs, "signatures": {}})
    export.run(recipe, run)
    assert "| en-de | trained | 12.00 |" in card.read_text()


def test_a_second_run_writes_nothing(world_2: TinyRun, tmp_path: Path) -> None:
    recipe, run = copy_of(world_2, "none", tmp_path / "run", "export.verify=0")
    weights = run.export / "routed" / "model.safetensors"
    export.run(recipe, run)
    assert not (run.export / "verification.json").exists()
    first = weights.stat()
    export.run(recipe, run)
    assert weights.stat() == first
    export.run(recipe, run, force=True)
    assert weights.stat().st_ino != first.st_ino
    weights.unlink()
    export.run(recipe, run)
    assert weights.exists()


def test_an_export_that_computes_something_else_is_an_error(
    world_2: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run = copy_of(world_2, "none", tmp_path / "run", "export.formats=[dense]")
    merged = Merged.tensor

    def wrong(self: Merged, stored: str, dtype: torch.dtype | None) -> torch.Tensor:
        value = merged(self, stored, dtype)
        return value + 1e-3 if "down_proj" in stored else value

    monkeypatch.setattr(Merged, "tensor", wrong)
    with pytest.raises(ArtefactError, match=r"dense does not compute what was trained.*it was deleted"):
        export.run(recipe, run)
    assert not run.record_path("export").exists()


def test_the_checkpoint_says_what_was_trained_not_the_recipe(world_2: TinyRun, tmp_path: Path) -> None:
    recipe, run = copy_of(world_2, "full", tmp_path / "run")
    edited = replace(recipe, train=replace(recipe.train, method="lander"))
    with pytest.raises(ConfigError, match="this checkpoint is of method full"):
        export.run(edited, run)


def test_a_training_in_bfloat16_on_a_float32_base(world_2: TinyRun, tmp_path: Path) -> None:
    recipe, run = copy_of(world_2, "bfloat16", tmp_path / "run", "export.formats=[routed]")
    export.run(recipe, run)
    actual = json.loads((run.export / "verification.json").read_text())["routed"]
    assert actual["expected_exact"]
    assert actual["max_logit_difference"] < 1e-5 * max(1.0, actual["max_logit"])


def test_in_bfloat16_the_proof_is_against_the_weights_that_were_used(
    world_2: TinyRun, tmp_path: Path
) -> None:
    """Masters are finer than the type of the training; the export of a bfloat16 base cannot hold them."""
    recipe, run = copy_of(
        world_2, "none", tmp_path / "run", "model.dtype=bfloat16", "export.dtype=bfloat16", "export.verify=1"
    )
    export.run(recipe, run)
    actual = json.loads((run.export / "verification.json").read_text())["routed"]
    assert actual["expected_exact"]
    assert actual["max_logit_difference"] < 1e-5 * max(1.0, actual["max_logit"])


def test_narrower_exports_are_not_called_exact(world_2: TinyRun, tmp_path: Path) -> None:
    recipe, run = copy_of(world_2, "none", tmp_path / "run", "export.dtype=bfloat16", "export.verify=1")
    export.run(recipe, run)
    actual = json.loads((run.export / "verification.json").read_text())["routed"]
    assert not actual["expected_exact"]
    assert actual["max_logit_difference"] > 1e-5
