"""Options of stage export and of the base's files that are refused or warned of."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.workspace import Workspace

from lander_ds.common.errors import ConfigError
from lander_ds.config.loading import load_recipe
from lander_ds.config.recipe import Recipe
from lander_ds.preflight.recipe import check_recipe


def recipe(workspace: Workspace, *overrides: str) -> Recipe:
    return load_recipe(workspace.recipe, list(overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["export.formats=[]"], r"export\.formats.*nothing to export"),
        (["export.formats=[delta, delta]"], r"export\.formats"),
        (["export.fold=[xx-yy]"], r"export\.fold.*xx-yy is no pair of data\.pairs"),
        (["export.fold=[mean, mean]"], r"export\.fold"),
        (["export.fold=[mean]", "routing.gate=none"], r"export\.fold.*no gate to fold.*remove fold"),
        (
            ["export.fold=[mean]", "train.method=full", "export.formats=[dense]"],
            r"export\.fold.*no gate to fold",
        ),
        (["export.shard_size=0"], r"export\.shard_size.*must be above 0"),
        (["export.shard_size=-1.5"], r"export\.shard_size.*must be above 0"),
        (["export.fold_sentences=-1"], r"export\.fold_sentences.*at least 0"),
        (["export.formats=[sparse]"], r"export\.formats"),
        (["export.shard_size=5GB"], r"export\.shard_size"),
    ],
)
def test_refused(workspace: Workspace, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_recipe(recipe(workspace, *overrides), "export")


@pytest.mark.parametrize(
    "overrides",
    [
        ["export.formats=[dense, routed, delta]", "export.fold=[mean]", "export.shard_size=0.5"],
        ["export.formats=[]", "export.fold=[mean]"],
        ["export.fold=[mean]", "routing.gate=none", "routing.other_pairs=mask"],
        ["export.formats=[delta, dense]", "train.method=lora"],
    ],
)
def test_accepted(workspace: Workspace, overrides: list[str]) -> None:
    check_recipe(recipe(workspace, *overrides), "export")


def test_options_without_effect_are_warned_of(workspace: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_recipe(recipe(workspace, "export.formats=[delta]", "export.dtype=float32"), "export")
    assert "no effect on a delta" in caplog.text


def test_pickles_are_refused_before_a_stage_starts(workspace: Workspace) -> None:
    actual = recipe(workspace)
    model = Path(actual.model.path)
    for path in model.glob("*.safetensors"):
        path.unlink()
    torch.save({}, model / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"model\.path.*only pickled weights.*model\.allow_pickle: true"):
        check_recipe(actual, "detect")
    allowed: Any = replace(actual, model=replace(actual.model, allow_pickle=True))
    check_recipe(allowed, "detect")
