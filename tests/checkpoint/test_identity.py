"""Whether a training may go on from a checkpoint, and what else may have changed."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import recipe_for
from support.small import KEEP_ALL, flip, parts, write

from lander_ds.checkpoint.checkpoint import Checkpoint, steps
from lander_ds.checkpoint.identity import FIXED, FREE, identity_of, starting_point
from lander_ds.checkpoint.writer import Writer
from lander_ds.common.errors import ArtefactError
from lander_ds.common.nested import flatten
from lander_ds.config.recipe import Recipe
from lander_ds.config.schema.training import LoraConfig, ShiraConfig

INPUTS = {"data": "of the data", "base": "of the base", "selection": "of the selection", "deepspeed": "x"}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return recipe_for(tmp_path / "base", tmp_path / "run")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


def saved(directory: Path, recipe: Recipe, *numbers: int) -> None:
    for step in numbers:
        write(directory, step, **identity_of(recipe, INPUTS))


def resumed(directory: Path, recipe: Recipe, **inputs: str) -> Checkpoint | None:
    return starting_point(directory, identity_of(recipe, {**INPUTS, **inputs}), False, True)


def test_no_checkpoints(directory: Path, recipe: Recipe) -> None:
    for force in (False, True):
        for auto_resume in (False, True):
            assert starting_point(directory, identity_of(recipe, INPUTS), force, auto_resume) is None


def test_the_newest_is_gone_on_from(
    directory: Path, recipe: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    saved(directory, recipe, 4, 8)
    with caplog.at_level(logging.INFO):
        actual = resumed(directory, recipe)
    assert actual is not None
    assert (actual.step, actual.checked) == (8, True)
    assert caplog.messages == [f"going on from {directory / 'step-8'}"]


def test_a_damaged_newest_one_is_passed_over(
    directory: Path, recipe: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    saved(directory, recipe, 4, 8)
    flip(directory / "step-8" / "optimizer-0.safetensors")
    actual = resumed(directory, recipe)
    assert actual is not None
    assert actual.step == 4
    assert "step-8/optimizer-0.safetensors is not what was written" in caplog.text
    assert steps(directory) == [4, 8]


def test_without_being_told_nothing_is_done(directory: Path, recipe: Recipe) -> None:
    saved(directory, recipe, 4, 8)
    with pytest.raises(
        ArtefactError, match=r"newest: step 8\): --auto-resume goes on from there, --force deletes"
    ):
        starting_point(directory, identity_of(recipe, INPUTS), False, False)
    assert steps(directory) == [4, 8]


def test_force_deletes(directory: Path, recipe: Recipe) -> None:
    saved(directory, recipe, 4, 8)
    assert starting_point(directory, identity_of(recipe, INPUTS), True, False) is None
    assert list(directory.iterdir()) == []


def test_no_whole_checkpoint(directory: Path, recipe: Recipe) -> None:
    saved(directory, recipe, 4)
    flip(directory / "step-4" / "trained-0.safetensors")
    with pytest.raises(ArtefactError, match="none of the 1 checkpoints"):
        resumed(directory, recipe)
    assert steps(directory) == [4]


def test_every_key_is_one_of_the_identity(recipe: Recipe) -> None:
    known = flatten(identity_of(recipe, INPUTS))
    assert set(FIXED) | set(FREE) <= set(known)
    assert not set(FIXED) & set(FREE)


OTHER_RECIPES: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"train": {"method": "layers"}}, "method was lander, now it is layers: change it back"),
    "pairs": ({"data": {"pairs": ("en-de", "en-fr")}}, r"pairs was \['en-de', 'en-fr', 'de-en'\]"),
    "dtype": ({"model": {"dtype": "bfloat16"}}, "dtype was float32, now it is bfloat16"),
    "quantize": ({"model": {"quantize": "nf4"}}, "quantize was None, now it is nf4: change it back"),
    "gate": ({"routing": {"gate": "output"}}, r"routing\.gate was input, now it is output"),
    "gate network": ({"routing": {"hidden": 16}}, r"routing\.hidden was 8, now it is 16"),
    "lora": ({"train": {"lora": LoraConfig(r=5, alpha=4.0)}}, r"lora\.r was 3, now it is 5"),
    "shira": ({"train": {"shira": ShiraConfig(r=5)}}, r"train\.shira\.r was 3, now it is 5"),
    "optimizer": ({"train": {"optimizer": "sgd"}}, r"train\.optimizer was adamw, now it is sgd"),
    "banks": ({"train": {"banks": ("general",)}}, r"train\.banks was \['general', 'specific'\]"),
}


def test_another_seed_would_move_the_entries_of_shira(directory: Path, recipe: Recipe) -> None:
    saved(directory, changed(recipe, {"train": {"method": "shira"}}), 4)
    other = replace(changed(recipe, {"train": {"method": "shira"}}), seed=9)
    with pytest.raises(ArtefactError, match="another training: seed was 1, now it is 9"):
        resumed(directory, other)


def test_an_option_that_did_not_exist_yet_was_what_is_its_default(
    directory: Path, recipe: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    identity = identity_of(recipe, INPUTS)
    del identity["train"]["shira"]
    write(directory, 4, **identity)
    plain = changed(recipe, {"train": {"shira": ShiraConfig()}})
    with caplog.at_level(logging.WARNING):
        assert resumed(directory, plain) is not None
    assert caplog.text == ""
    with pytest.raises(ArtefactError, match=r"train\.shira\.r was 16, now it is 3"):
        resumed(directory, recipe)


def changed(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    return replace(
        recipe, **{name: replace(getattr(recipe, name), **values) for name, values in changes.items()}
    )


@pytest.mark.parametrize("case", OTHER_RECIPES)
def test_another_training_is_refused(directory: Path, recipe: Recipe, case: str) -> None:
    saved(directory, recipe, 4)
    changes, wording = OTHER_RECIPES[case]
    with pytest.raises(ArtefactError, match=rf"step-4 is of another training: {wording}.*--force"):
        resumed(directory, changed(recipe, changes))
    assert steps(directory) == [4]


@pytest.mark.parametrize(
    ("name", "wording"),
    [
        ("base", r"base_fingerprint was of the base, now it is another: correct model\.path"),
        (
            "data",
            "data_hash was of the data, now it is another: run prepare with the corpora and options of then",
        ),
        (
            "selection",
            "selection_hash was of the selection, now it is another: bring back the selection of then",
        ),
    ],
)
def test_other_inputs_are_refused(directory: Path, recipe: Recipe, name: str, wording: str) -> None:
    saved(directory, recipe, 4)
    with pytest.raises(ArtefactError, match=wording):
        resumed(directory, recipe, **{name: "another"})


def test_a_method_without_selection_has_none_to_compare(directory: Path, recipe: Recipe) -> None:
    """Whatever file of that name lies in the run directory by now."""
    full = changed(recipe, {"train": {"method": "full"}})
    identity = identity_of(full, {"data": "of the data", "base": "of the base"})
    saving = Writer(directory, KEEP_ALL, background=False)
    saving.save(4, parts(4), identity, None)
    saving.finish()
    for inputs in ({}, {"selection": "new"}):
        actual = starting_point(directory, identity_of(full, {**INPUTS, **inputs}), False, True)
        assert actual is not None
        assert actual.selection() is None


FREE_CHANGES = {
    "steps": 2000,
    "micro_batch": 4,
    "activation_checkpointing": True,
    "save_every": 7,
    "save_in_background": False,
    "keep_last": 3,
    "valid_every": 5,
    "patience": 2,
    "max_skipped": 1,
    "stall_seconds": 60.0,
    "log_every": 10,
}


@pytest.mark.parametrize("key", FREE_CHANGES)
def test_what_changes_no_update_may_change(
    directory: Path, recipe: Recipe, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    saved(directory, recipe, 4)
    assert resumed(directory, changed(recipe, {"train": {key: FREE_CHANGES[key]}})) is not None
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("changes", "wording"),
    [
        ({"train": {"clip": 0.5}}, "train.clip was 1.0, now it is 0.5"),
        ({"train": {"betas": (0.8, 0.9)}}, "train.betas was [0.9, 0.95], now it is [0.8, 0.9]"),
        ({"routing": {"alpha_max": 3.0}}, "routing.alpha_max was 0.0, now it is 3.0"),
    ],
)
def test_other_changes_are_told(
    directory: Path,
    recipe: Recipe,
    changes: dict[str, Any],
    wording: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    saved(directory, recipe, 4)
    assert resumed(directory, changed(recipe, changes)) is not None
    assert caplog.messages == [f"going on with another option than before: {wording}"]


def test_an_unchanged_recipe_is_silent(
    directory: Path, recipe: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    saved(directory, recipe, 4)
    assert resumed(directory, recipe) is not None
    assert caplog.messages == []
