"""Checkpoint directories: whole, verified, tied to their base."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.checkpoints import PAIRS, recipe_for, write_checkpoint
from support.tiny_models import save, tiny_model

from lander_ds.checkpoint import checkpoint
from lander_ds.checkpoint.checkpoint import SELECTION, STATE, TRAINED
from lander_ds.config.recipe import Recipe
from lander_ds.errors import ArtefactError
from lander_ds.run import RunDirectory
from lander_ds.selection.selection import Selection
from lander_ds.training.inference import open_for_inference


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A run with a base model and no checkpoint yet."""
    return recipe_for(save(tiny_model("llama"), tmp_path / "base"), tmp_path / "run")


def test_round_trip(recipe: Recipe) -> None:
    tensors = write_checkpoint(recipe, 40)
    run = RunDirectory(recipe.run_dir)
    found = checkpoint.newest(run.checkpoints)
    assert (found.step, found.path) == (40, run.checkpoints / "step-40")
    loaded = found.trained()
    assert set(loaded) == set(tensors)
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())
    assert all(value.dtype == torch.float32 for value in loaded.values())
    selection = found.selection()
    assert selection is not None
    assert [s.banks for s in selection.layers] == [s.banks for s in Selection.load(run.selection).layers]
    assert found.state["method"] == "lander"
    assert found.state["pairs"] == list(PAIRS)
    assert found.state["versions"]["torch"]


def test_a_method_without_selection(recipe: Recipe) -> None:
    write_checkpoint(replace(recipe, train=replace(recipe.train, method="full")))
    found = checkpoint.newest(RunDirectory(recipe.run_dir).checkpoints)
    assert found.selection() is None
    assert not (found.path / SELECTION).exists()


def test_the_newest_has_most_steps_not_the_last_date_or_name(recipe: Recipe) -> None:
    for step in (100, 9, 20):
        write_checkpoint(recipe, step)
    directory = RunDirectory(recipe.run_dir).checkpoints
    assert checkpoint.newest(directory).step == 100
    assert checkpoint.load(directory / "step-9").step == 9


def test_unfinished_and_foreign_directories_are_no_checkpoints(recipe: Recipe) -> None:
    write_checkpoint(recipe, 3)
    directory = RunDirectory(recipe.run_dir).checkpoints
    for name in (".step-8.new.tmp", "step-9-copy", "step-x"):
        (directory / name).mkdir()
    assert checkpoint.newest(directory).step == 3


def test_writing_the_same_step_again_replaces_it(recipe: Recipe) -> None:
    write_checkpoint(recipe, 3)
    directory = RunDirectory(recipe.run_dir).checkpoints
    checkpoint.write(directory, 3, {"only": torch.ones(2)}, None, {"method": "full"})
    assert set(checkpoint.newest(directory).trained()) == {"only"}
    assert [path.name for path in directory.iterdir()] == ["step-3"]


def test_a_write_that_fails_leaves_the_older_one_alone(recipe: Recipe) -> None:
    tensors = write_checkpoint(recipe, 3)
    directory = RunDirectory(recipe.run_dir).checkpoints
    with pytest.raises(FileNotFoundError):
        checkpoint.write(directory, 3, {"only": torch.ones(2)}, directory / "no such selection", {})
    assert set(checkpoint.newest(directory).trained()) == set(tensors)
    assert [path.name for path in directory.iterdir()] == ["step-3"]


def test_a_write_clears_what_a_killed_one_left(recipe: Recipe) -> None:
    directory = RunDirectory(recipe.run_dir).checkpoints
    (directory / ".step-3.new.tmp").mkdir(parents=True)
    (directory / ".step-3.new.tmp" / TRAINED).write_bytes(b"half")
    write_checkpoint(recipe, 3)
    assert [path.name for path in directory.iterdir()] == ["step-3"]


def test_remove_all(recipe: Recipe) -> None:
    directory = RunDirectory(recipe.run_dir).checkpoints
    for step in (1, 2):
        write_checkpoint(recipe, step)
    (directory / ".step-3.new.tmp").mkdir()
    (directory / "notes").mkdir()
    checkpoint.remove_all(directory)
    assert [path.name for path in directory.iterdir()] == ["notes"]


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a flipped bit in the weights": (TRAINED, lambda path: _flip(path / TRAINED)),
    "cut weights": (
        TRAINED,
        lambda path: (path / TRAINED).write_bytes((path / TRAINED).read_bytes()[:-100]) and None,  # type: ignore[func-returns-value]
    ),
    "no weights": (TRAINED, lambda path: (path / TRAINED).unlink()),
    "a selection of another run": (SELECTION, lambda path: _flip(path / SELECTION)),
    "no selection": (SELECTION, lambda path: (path / SELECTION).unlink()),
    "no state": (STATE, lambda path: (path / STATE).unlink()),
    "half a state": (STATE, lambda path: (path / STATE).write_text('{"format": ') and None),  # type: ignore[func-returns-value]
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused(recipe: Recipe, damage: str) -> None:
    write_checkpoint(recipe)
    run = RunDirectory(recipe.run_dir)
    file, break_it = DAMAGES[damage]
    break_it(run.checkpoints / "step-7")
    with pytest.raises(ArtefactError, match=f"step-7/{file}.* train again"):
        open_for_inference(recipe, run, "trained")


def test_another_format_is_refused(recipe: Recipe) -> None:
    write_checkpoint(recipe)
    path = RunDirectory(recipe.run_dir).checkpoints / "step-7"
    state = json.loads((path / STATE).read_text())
    (path / STATE).write_text(json.dumps({**state, "format": "lander-checkpoint-0"}))
    with pytest.raises(ArtefactError, match=r"step-7 is not a lander-checkpoint-1 directory"):
        checkpoint.load(path)


def test_no_checkpoint_says_what_to_run(recipe: Recipe) -> None:
    with pytest.raises(ArtefactError, match="run stage train first"):
        open_for_inference(recipe, RunDirectory(recipe.run_dir), "trained")


def test_another_base_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    write_checkpoint(recipe)
    other = tiny_model("llama")
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1.0
    save(other, tmp_path / "other")
    moved = replace(recipe, model=replace(recipe.model, path=str(tmp_path / "other")))
    with pytest.raises(ArtefactError, match=r"another base model.*correct model\.path, or train again"):
        open_for_inference(moved, RunDirectory(recipe.run_dir), "trained")


def test_the_options_of_the_training_win_over_those_of_the_recipe(recipe: Recipe) -> None:
    """Who edits the recipe after training still opens what was trained."""
    tensors = write_checkpoint(recipe)
    edited = replace(
        recipe,
        routing=replace(recipe.routing, gate="none"),
        train=replace(recipe.train, method="lora"),
    )
    opened = open_for_inference(edited, RunDirectory(recipe.run_dir), "trained")
    parameters = dict(opened.model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in tensors.items())
    assert any(".router." in name for name in parameters)
