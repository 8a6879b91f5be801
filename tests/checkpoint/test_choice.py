"""Which checkpoint is taken, and what is said of a recipe that has changed since."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
from support.checkpoints import recipe_for, write_checkpoint
from support.small import write
from support.tiny_models import save, tiny_model

from lander_ds.checkpoint import checkpoint
from lander_ds.checkpoint.choice import as_trained, chosen, description, warn_of_changes
from lander_ds.checkpoint.identity import identity_of
from lander_ds.common.errors import ArtefactError
from lander_ds.common.files import file_hash
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.recipe import Recipe


@pytest.mark.parametrize(
    ("losses", "choice", "step"),
    [
        ({2: 1.5, 4: 1.2, 6: 1.3}, "last", 6),
        ({2: 1.5, 4: 1.2, 6: 1.3}, "best", 4),
        ({2: 1.2, 4: 1.2, 6: None}, "best", 2),
        ({2: None, 4: float("nan"), 6: 3.0}, "best", 6),
        ({2: None, 4: None, 6: None}, "step-4", 4),
    ],
)
def test_the_one_that_is_asked_for(
    tmp_path: Path, losses: dict[int, float | None], choice: str, step: int
) -> None:
    for number, loss in losses.items():
        write(tmp_path, number, valid_loss=loss)
    assert chosen(tmp_path, choice).step == step


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (
            "best",
            r"export\.checkpoint: best: no checkpoint in .* was measured as train\.keep_best says: train with ",
        ),
        ("step-3", r"export\.checkpoint: step-3 is not in .*: there are step-2, step-4"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(tmp_path: Path, choice: str, message: str) -> None:
    for number in (2, 4):
        write(tmp_path, number)
    with pytest.raises(ArtefactError, match=message):
        chosen(tmp_path, choice, "export.checkpoint")


@pytest.mark.parametrize("choice", ["last", "best", "step-4"])
def test_without_any_train_first(tmp_path: Path, choice: str) -> None:
    with pytest.raises(ArtefactError, match="run stage train first"):
        chosen(tmp_path, choice)


def test_one_that_is_damaged_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, 2)
    victim = next(path.glob("trained-*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(ArtefactError, match="is not what was written"):
        chosen(tmp_path, "step-2")


def test_what_is_said_of_one_needs_no_more_than_its_description(tmp_path: Path) -> None:
    assert description(tmp_path, "last") is None
    for number, loss in {2: 1.5, 4: 1.2, 6: 1.3, 8: None}.items():
        write(tmp_path, number, valid_loss=loss)
    (tmp_path / "step-8" / "state.json").write_text("{", encoding="utf-8")
    steps = {
        choice: state["step"]
        for choice in ("last", "best", "step-2")
        if (state := description(tmp_path, choice))
    }
    assert steps == {"last": 6, "best": 4, "step-2": 2}
    assert description(tmp_path, "step-3") is None


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return recipe_for(save(tiny_model("llama"), tmp_path / "base"), tmp_path / "run")


def test_what_has_changed_since_is_said_and_what_was_trained_counts(
    recipe: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    write_checkpoint(recipe)
    run = RunDirectory(recipe.run_dir)
    saved = checkpoint.newest(run.checkpoints)
    assert saved.state["data_hash"] == "none"
    unchanged = {
        "base": saved.state["base_fingerprint"],
        "data": "none",
        "selection": file_hash(run.selection),
    }
    assert identity_of(recipe, unchanged)["method"] == "lander"
    with caplog.at_level(logging.WARNING):
        warn_of_changes(saved.state, recipe, run, "none")
    assert "selection_hash" not in caplog.text or saved.state["selection_hash"] is None
    caplog.clear()
    edited = replace(
        recipe,
        seed=9,
        routing=replace(recipe.routing, gate="none"),
        train=replace(recipe.train, method="lora", clip=0.25, steps=7),
    )
    with caplog.at_level(logging.WARNING):
        warn_of_changes(saved.state, edited, run, "other data")
    for change in (
        "seed=1; now it is 9",
        "routing.gate=input; now it is none",
        "data_hash=none; now it is other",
    ):
        assert change in caplog.text
    assert "train.steps" not in caplog.text
    assert as_trained(edited, saved.state) == recipe
