"""`lander plan` as a person calls it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.planned import ROOT, recipe_of

from lander_ds.cli.main import main as cli
from lander_ds.config.loading import dump_recipe

CLUSTER = str(ROOT / "examples" / "clusters" / "8xa100-80g.yaml")


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe_of(tmp_path, "llama")))
    return str(path)


def test_a_table_without_weights_or_corpora(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["plan", "--recipe", recipe, "--cluster", CLUSTER]) == 0
    shown = capsys.readouterr().out
    assert "the bank sizes are estimated" in shown
    assert "checkpoint" in shown
    assert "zero3_offload" in shown
    assert "bubble" in shown
    assert max(map(len, shown.splitlines())) <= 160


def test_what_does_not_fit_is_said(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = tmp_path / "small.yaml"
    small.write_text(Path(CLUSTER).read_text().replace("gpu_memory: 80", "gpu_memory: 2.00001"))
    assert cli(["plan", "--recipe", recipe, "--cluster", str(small), "--all"]) == 0
    assert "zero3 1x8 does not fit into GPU memory: " in capsys.readouterr().out


def test_json_and_plot(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "plots" / "plan.png"
    arguments = [
        "plan",
        "--recipe",
        recipe,
        "--cluster",
        CLUSTER,
        "--json",
        "--plot",
        str(plot),
        "--nodes",
        "2",
    ]
    assert cli(arguments) == 0
    actual: dict[str, Any] = json.loads(capsys.readouterr().out)
    names = {plan["name"] for plan in actual["plans"]}
    assert names == {"replicated", "zero3", "zero3_offload", "pipeline", "pipeline_zero3"}
    assert actual["best"].split()[0] in names
    holding = actual["plans"][0]["parts"][0]["held"]
    assert {"weights", "gradients", "optimizer", "activations", "gathered", "on_host"} <= set(holding)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in plot.parent.iterdir()] == ["plan.png"]


def test_what_is_missing_is_said(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli(["plan", "--recipe", recipe])
    assert stopped.value.code == 2
    assert "the following arguments are required: --cluster" in capsys.readouterr().err
    assert cli(["plan", "--recipe", recipe, "--cluster", CLUSTER, "--plot", "plan"]) == 2
    assert ".png, .svg or .pdf" in capsys.readouterr().err
    gone = ["plan", "--recipe", recipe, "--cluster", CLUSTER, "--set", f"model.path={tmp_path}/gone"]
    assert cli(gone) == 2
    assert "gone" in capsys.readouterr().err


def test_numbers_are_checked(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    for option, value in (("--target-share", "0"), ("--example-tokens", "0"), ("--nodes", "0")):
        with pytest.raises(SystemExit):
            cli(["plan", "--recipe", recipe, "--cluster", CLUSTER, option, value])
        assert "must be" in capsys.readouterr().err
