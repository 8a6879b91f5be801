"""Stage select in a run directory."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.fabricate import PAIRS, random_awareness

from lander_ds.common.errors import ArtefactError, ConfigError
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.recipe import ModelConfig, Recipe
from lander_ds.config.schema.data import CorpusConfig, DataConfig
from lander_ds.config.schema.method import BankChoice, LayerChoice, SelectConfig
from lander_ds.method.selection import Selection
from lander_ds.stages import select


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path)
    random_awareness().save(directory.awareness)
    return directory


@pytest.fixture
def recipe(run: RunDirectory) -> Recipe:
    return Recipe(
        run_dir=str(run.path),
        model=ModelConfig("unused"),
        data=DataConfig(PAIRS, (CorpusConfig("unused"),)),
        deepspeed="unused.json",
        select=SelectConfig(LayerChoice(k=2), BankChoice(rho=0.7)),
    )


def test_writes_selection_and_record(
    recipe: Recipe, run: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "lander_ds"):
        select.run(recipe, run)
    selection = Selection.load(run.selection)
    assert len(selection.layers) == 2
    assert "selection.safetensors" in run.read_record("select")["outputs"]
    first = selection.layers[0]
    assert f"{first.layer:>8} {len(first.banks):>8}       29       11        0" in caplog.text
    owned = {"all": 0, "specific": 0}
    for layer in selection.layers:
        for bank in layer.banks:
            if "en-ru" in bank.owners:
                owned["all"] += bank.size
                owned["specific"] += bank.size if bank.kind == "specific" else 0
    assert f"en-ru owns {owned['all']} neurons, {owned['specific']} of them specific" in caplog.text


def test_does_nothing_when_up_to_date(recipe: Recipe, run: RunDirectory) -> None:
    select.run(recipe, run)
    written = run.selection.stat().st_mtime_ns
    select.run(recipe, run)
    assert run.selection.stat().st_mtime_ns == written
    select.run(recipe, run, force=True)
    assert run.selection.stat().st_mtime_ns > written


def test_runs_again_when_options_awareness_or_output_changed(recipe: Recipe, run: RunDirectory) -> None:
    select.run(recipe, run)
    before = Selection.load(run.selection)
    other = replace(recipe, select=replace(recipe.select, layers=LayerChoice(k=3)))
    select.run(other, run)
    assert len(Selection.load(run.selection).layers) == 3
    random_awareness(seed=5).save(run.awareness)
    select.run(other, run)
    assert Selection.load(run.selection).metadata["awareness_hash"] != before.metadata["awareness_hash"]
    run.selection.write_bytes(b"broken")
    select.run(other, run)
    assert len(Selection.load(run.selection).layers) == 3


def test_the_recipe_orders_the_pairs(recipe: Recipe, run: RunDirectory) -> None:
    select.run(recipe, run)
    before = Selection.load(run.selection)
    turned = replace(recipe, data=replace(recipe.data, pairs=PAIRS[::-1]))
    select.run(turned, run)
    after = Selection.load(run.selection)
    assert after.pairs == PAIRS[::-1]
    assert [layer.layer for layer in after.layers] == [layer.layer for layer in before.layers]
    for old, new in zip(before.layers, after.layers, strict=True):
        for pair in PAIRS:
            neurons = [
                sorted(
                    index
                    for bank, members in zip(layer.banks, layer.slices(), strict=True)
                    if bank.kind == "specific" and pair in bank.owners
                    for index in members.tolist()
                )
                for layer in (old, new)
            ]
            assert neurons[0] == neurons[1]


@pytest.mark.parametrize("pairs", [PAIRS[:3], (*PAIRS, "en-zh")])
def test_other_pairs(recipe: Recipe, run: RunDirectory, pairs: tuple[str, ...]) -> None:
    with pytest.raises(ArtefactError, match=r"data\.pairs.*run stage detect"):
        select.run(replace(recipe, data=replace(recipe.data, pairs=pairs)), run)
    assert not run.selection.exists()


def test_without_awareness(recipe: Recipe, run: RunDirectory) -> None:
    run.awareness.unlink()
    with pytest.raises(ArtefactError, match="does not exist: run stage detect"):
        select.run(recipe, run)


def test_impossible_choice_leaves_nothing(recipe: Recipe, run: RunDirectory) -> None:
    wrong = replace(recipe, select=SelectConfig(LayerChoice(k=50)))
    with pytest.raises(ConfigError, match=r"select\.layers\.k"):
        select.run(wrong, run)
    assert not run.selection.exists()
    assert not run.record_path("select").exists()


def test_same_awareness_same_bytes(recipe: Recipe, run: RunDirectory) -> None:
    select.run(recipe, run)
    written = run.selection.read_bytes()
    for _ in range(4):
        select.run(recipe, run, force=True)
        assert run.selection.read_bytes() == written


def test_remarks_are_logged(recipe: Recipe, run: RunDirectory, caplog: pytest.LogCaptureFixture) -> None:
    random_awareness(pairs=1).save(run.awareness)
    select.run(replace(recipe, data=replace(recipe.data, pairs=PAIRS[:1])), run)
    assert "There is one pair, en-de" in caplog.text
    assert torch.equal(Selection.load(run.selection).layers[0].permutation, torch.arange(40))
