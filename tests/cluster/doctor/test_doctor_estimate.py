"""Sizes before anything is there, and what they mean for disks and memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.tiny_run import SELECTED, TinyRun
from support.workspace import Workspace

from lander_ds.cluster.doctor.estimate import Need, checkpoints_at_once, export_bytes, need_of
from lander_ds.config.loading import load_recipe
from lander_ds.config.recipe import Recipe
from lander_ds.config.schema.training import TrainConfig


@pytest.fixture
def recipe(workspace: Workspace) -> Recipe:
    """A sound recipe."""
    return load_recipe(workspace.recipe)


def test_with_a_selection_the_checkpoint_is_known_and_without_one_estimated(tiny_run: TinyRun) -> None:
    def need(name: str, *overrides: str) -> Need:
        return need_of(tiny_run.recipe(name, *overrides), [2])

    run_dir = tiny_run.root / "doctor"
    tiny_run.selection(SELECTED).save(run_dir / "selection.safetensors")
    known, unknown, everything = need("doctor"), need("none"), need("none", "train.method=full")
    assert (known.estimated, unknown.estimated, everything.estimated) == (False, True, False)
    assert known.checkpoint < everything.checkpoint
    assert known.device < everything.device
    # A dense model in float32, with every parameter in the checkpoint three times.
    dense = need("none", "train.method=full", "export.formats=[dense]", "export.dtype=float32")
    assert everything.checkpoint == pytest.approx(3 * dense.exports, rel=0.1)


def test_more_ranks_hold_less_each(tiny_run: TinyRun) -> None:
    recipe = tiny_run.recipe("none")
    assert need_of(recipe, [8]).device < need_of(recipe, [2]).device


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 1),
        ({"save_every": 30}, 4),
        ({"save_every": 25}, 4),
        ({"save_every": 10, "keep_last": 2}, 3),
        ({"save_every": 10, "keep_last": 2, "valid_every": 10}, 4),
        ({"save_every": 10, "keep_last": 2, "keep_every": 50, "keep_best": "off"}, 5),
        ({"save_every": 50, "keep_last": 9}, 2),
    ],
)
def test_checkpoints_that_lie_on_disk_at_once(changes: dict[str, int], count: int) -> None:
    assert checkpoints_at_once(replace(TrainConfig(steps=100), **changes)) == count  # type: ignore[arg-type]


def test_exports(recipe: Recipe) -> None:
    export = replace(recipe.export, formats=("dense", "delta"), fold=("en-de",), dtype="bfloat16")
    assert export_bytes(replace(recipe, export=export), 1000, 100) == 2 * 2000 + 200
