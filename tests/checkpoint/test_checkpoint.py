"""Reading checkpoints: whole or refused, tied to their base, independent of who wrote them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import PAIRS, recipe_for, write_checkpoint
from support.small import flip, write
from support.tiny_models import save, tiny_model

from lander_ds.checkpoint import checkpoint
from lander_ds.checkpoint.checkpoint import DIGEST, SELECTION, STATE
from lander_ds.common.errors import ArtefactError
from lander_ds.common.files import json_hash
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.recipe import Recipe
from lander_ds.distributed.start import Start
from lander_ds.inference.open import open_for_inference
from lander_ds.method.selection import Selection

TRAINED = "trained-0.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model("llama"), tmp_path_factory.mktemp("base"))


@pytest.fixture
def recipe(base: Path, tmp_path: Path) -> Recipe:
    """A run with a base model and no checkpoint yet."""
    return recipe_for(base, tmp_path / "run")


def test_round_trip(recipe: Recipe) -> None:
    tensors = write_checkpoint(recipe, 40)
    run = RunDirectory(recipe.run_dir)
    actual = checkpoint.newest(run.checkpoints)
    assert (actual.step, actual.path) == (40, run.checkpoints / "step-40")
    loaded = actual.trained()
    assert set(loaded) == set(tensors)
    assert len(loaded) == len(tensors)
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())
    assert all(value.dtype == torch.float32 for value in loaded.values())
    selection = actual.selection()
    assert selection is not None
    assert [s.banks for s in selection.layers] == [s.banks for s in Selection.load(run.selection).layers]
    assert actual.state["method"] == "lander"
    assert actual.state["pairs"] == list(PAIRS)
    assert actual.state["versions"]["torch"]


def test_a_method_without_selection(recipe: Recipe) -> None:
    write_checkpoint(replace(recipe, train=replace(recipe.train, method="full")))
    actual = checkpoint.newest(RunDirectory(recipe.run_dir).checkpoints)
    assert actual.selection() is None
    assert not (actual.path / SELECTION).exists()


def test_the_newest_has_most_steps_not_the_last_date_or_name(tmp_path: Path) -> None:
    for step in (100, 9, 20):
        write(tmp_path, step)
    assert checkpoint.steps(tmp_path) == [9, 20, 100]
    assert checkpoint.newest(tmp_path).step == 100
    assert checkpoint.load(tmp_path / "step-9").step == 9


def test_unfinished_and_foreign_directories_are_no_checkpoints(tmp_path: Path) -> None:
    write(tmp_path, 3)
    for name in (".step-8.1234.tmp", "step-9-copy", "step-9.replaced-1", "step-x"):
        (tmp_path / name).mkdir()
    assert checkpoint.steps(tmp_path) == [3]
    assert checkpoint.newest(tmp_path).step == 3


def _edit(path: Path, **changes: Any) -> None:
    state = json.loads((path / STATE).read_text())
    (path / STATE).write_text(json.dumps({**state, **changes}))


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a flipped bit in the weights": (TRAINED, lambda path: flip(path / TRAINED)),
    "cut weights": (
        TRAINED,
        lambda path: (path / TRAINED).write_bytes((path / TRAINED).read_bytes()[:-100]),
    ),
    "no weights": (TRAINED, lambda path: (path / TRAINED).unlink()),
    "a directory instead of weights": (
        TRAINED,
        lambda path: ((path / TRAINED).unlink(), (path / TRAINED).mkdir()),
    ),
    "a selection of another run": (SELECTION, lambda path: flip(path / SELECTION)),
    "no selection": (SELECTION, lambda path: (path / SELECTION).unlink()),
    "no state": (STATE, lambda path: (path / STATE).unlink()),
    "a directory instead of a state": (
        STATE,
        lambda path: ((path / STATE).unlink(), (path / STATE).mkdir()),
    ),
    "half a state": (STATE, lambda path: (path / STATE).write_text('{"format": ')),
    "a flipped bit in the step": (STATE, lambda path: _edit(path, step=6)),
    "a flipped bit in the options": (STATE, lambda path: _edit(path, method="landep")),
    "a state without its hash": (STATE, lambda path: _edit(path, **{DIGEST: None})),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, damage: str) -> None:
    path = write(tmp_path, 7)
    file, break_it = DAMAGES[damage]
    break_it(path)
    with pytest.raises(ArtefactError, match=f"step-7/{file}.* train again"):
        checkpoint.load(path).verified()


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_one_before_a_damaged_checkpoint_is_used(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 5)
    file, break_it = DAMAGES[damage]
    break_it(write(tmp_path, 7))
    with caplog.at_level(logging.WARNING):
        assert checkpoint.newest(tmp_path).step == 5
    [wording] = caplog.messages
    assert f"step-7/{file}" in wording
    assert wording.endswith("looking for an earlier one")


def test_none_is_whole(tmp_path: Path) -> None:
    for step in (5, 7):
        flip(write(tmp_path, step) / TRAINED)
    with pytest.raises(ArtefactError, match=r"none of the 2 checkpoints .* is whole: .*--force"):
        checkpoint.newest(tmp_path)


def test_what_is_read_is_compared_first(tmp_path: Path) -> None:
    path = write(tmp_path, 7)
    flip(path / "optimizer-0.safetensors")
    actual = checkpoint.load(path)
    assert set(actual.trained()) == {"weight.0"}
    with pytest.raises(ArtefactError, match="optimizer-0"):
        actual.optimizer()


def test_each_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    actual = checkpoint.load(write(tmp_path, 7)).verified()
    monkeypatch.setattr(checkpoint, "file_hash", lambda path: pytest.fail(f"{path} is hashed again"))
    assert torch.equal(actual.trained()["weight.0"] + 2.0, actual.optimizer()["exp_avg_sq/weight.0"])


def _sign(path: Path, **changes: Any) -> Path:
    """Change state.json as somebody does who knows how it is hashed."""
    state = {**json.loads((path / STATE).read_text()), **changes}
    del state[DIGEST]
    (path / STATE).write_text(json.dumps({**state, DIGEST: json_hash(state)}))
    return path


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = _sign(write(tmp_path, 7), format="lander-checkpoint-0")
    with pytest.raises(ArtefactError, match=r"step-7 is not a lander-checkpoint-2 directory"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "trained-0.safetensors/../../x", "trained-0.pt"]
)
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    path = _sign(write(tmp_path, 7), files={name: {"bytes": 1, "sha256": ""}})
    with pytest.raises(ArtefactError, match=r"state\.json is damaged"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"files": None},
        {"files": [1]},
        {"files": {"trained-0.safetensors": {}}},
        {"files": {"trained-0.safetensors": 7}},
        {"step": None},
        {"step": "seven"},
    ],
)
def test_a_state_of_another_shape_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = _sign(write(tmp_path, 7), **changes)
    with pytest.raises(ArtefactError, match=r"state\.json is damaged"):
        checkpoint.load(path)


def test_a_renamed_checkpoint_is_refused(tmp_path: Path) -> None:
    renamed = write(tmp_path, 7).rename(tmp_path / "step-70")
    with pytest.raises(ArtefactError, match="step-70 is step 7"):
        checkpoint.load(renamed)
    assert checkpoint.load(renamed.rename(tmp_path / "the-good-one")).step == 7


def test_no_checkpoint_says_what_to_run(recipe: Recipe) -> None:
    with pytest.raises(ArtefactError, match="run stage train first"):
        open_for_inference(Start(recipe, RunDirectory(recipe.run_dir)), "trained")


def test_inference_uses_the_one_before_a_damaged_checkpoint(recipe: Recipe) -> None:
    tensors = write_checkpoint(recipe, 5)
    write_checkpoint(recipe, 7)
    run = RunDirectory(recipe.run_dir)
    flip(run.checkpoints / "step-7" / TRAINED)
    parameters = dict(open_for_inference(Start(recipe, run), "trained").model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in tensors.items())


def test_another_base_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    write_checkpoint(recipe)
    other = tiny_model("llama")
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1.0
    save(other, tmp_path / "other")
    moved = replace(recipe, model=replace(recipe.model, path=str(tmp_path / "other")))
    with pytest.raises(ArtefactError, match=r"another base model.*correct model\.path, or train again"):
        open_for_inference(Start(moved, RunDirectory(recipe.run_dir)), "trained")


def test_the_options_of_the_training_win_over_those_of_the_recipe(recipe: Recipe) -> None:
    """Who edits the recipe after training still opens what was trained."""
    tensors = write_checkpoint(recipe)
    edited = replace(
        recipe,
        routing=replace(recipe.routing, gate="none"),
        train=replace(recipe.train, method="lora"),
    )
    opened = open_for_inference(Start(edited, RunDirectory(recipe.run_dir)), "trained")
    parameters = dict(opened.model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in tensors.items())
    assert any(".router." in name for name in parameters)
