"""Stage export on trainings that really ran: it writes, proves and skips."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.tiny_run import PAIRS, TinyRun
from support.training_runs import JOBS

from lander_ds.config.recipe import Recipe
from lander_ds.errors import ArtefactError, ConfigError
from lander_ds.export.trained import TrainedModel
from lander_ds.run import RunDirectory
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
    ],
)
def test_exports_compute_what_was_trained(
    world_2: TinyRun, tmp_path: Path, name: str, formats: list[str]
) -> None:
    recipe, run = copy_of(world_2, name, tmp_path / "run", f"export.formats={formats}")
    export.run(recipe, run)
    proof = json.loads((run.export / "verification.json").read_text())
    assert set(proof) == set(formats)
    for kind, found in proof.items():
        assert found["sentences"] == 2 * len(PAIRS)
        exact = not (kind == "dense" and name == "input")
        assert found["expected_exact"] == exact
        if exact:
            assert found["max_logit_difference"] < 1e-5 * max(1.0, found["max_logit"])
            assert found["same_greedy"]
        else:
            assert found["max_logit_difference"] > 1e-3, "gates have been dropped"
        assert (run.export / kind / "tokenizer.json").exists()


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
    merged = TrainedModel.merged

    def wrong(self: TrainedModel, stored: str, *rest: object) -> torch.Tensor:
        value = merged(self, stored, *rest)  # type: ignore[arg-type]
        return value + 1e-3 if "down_proj" in stored else value

    monkeypatch.setattr(TrainedModel, "merged", wrong)
    with pytest.raises(ArtefactError, match=r"dense does not compute what was trained.*do not use it"):
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
    found = json.loads((run.export / "verification.json").read_text())["routed"]
    assert found["expected_exact"]
    assert found["max_logit_difference"] < 1e-5 * max(1.0, found["max_logit"])


def test_in_bfloat16_the_proof_is_against_the_weights_that_were_used(
    world_2: TinyRun, tmp_path: Path
) -> None:
    """Masters are finer than the type of the training; the export of a bfloat16 base cannot hold them."""
    recipe, run = copy_of(
        world_2, "none", tmp_path / "run", "model.dtype=bfloat16", "export.dtype=bfloat16", "export.verify=1"
    )
    export.run(recipe, run)
    found = json.loads((run.export / "verification.json").read_text())["routed"]
    assert found["expected_exact"]
    assert found["max_logit_difference"] < 1e-5 * max(1.0, found["max_logit"])


def test_narrower_exports_are_not_called_exact(world_2: TinyRun, tmp_path: Path) -> None:
    recipe, run = copy_of(world_2, "none", tmp_path / "run", "export.dtype=bfloat16", "export.verify=1")
    export.run(recipe, run)
    found = json.loads((run.export / "verification.json").read_text())["routed"]
    assert not found["expected_exact"]
    assert found["max_logit_difference"] > 1e-5
