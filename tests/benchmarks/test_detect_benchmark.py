"""benchmarks/detect.py on a tiny model: three systems take turns; its two figures."""

from __future__ import annotations

import json
from pathlib import Path

import deepspeed
import pytest
from detect import figures, main
from support.scripts import run_script
from support.tiny_models import save, tiny_model

OPTIONS = ("--tokens", "32", "--length", "8", "--rounds", "2", "--dtype", "float32", "--json")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model("gemma3"), tmp_path_factory.mktemp("model"))


def test_figures_are_of_medians() -> None:
    seconds = {"detect": [9.0, 2.1, 2.1], "bare": [2.0, 2.0, 7.0], "full": [3.0, 3.0, 3.0]}
    assert figures(seconds) == {"ratio_full": 0.7, "hook_share": 0.05}


def test_a_whole_run(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # DeepSpeed's own collectives would be made by a C++ compiler first.
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", False)
    assert run_script(main, "--model", str(model), *OPTIONS) == 0
    actual = json.loads(capsys.readouterr().out)
    assert {name: len(values) for name, values in actual["processor_seconds"].items()} == {
        "detect": 2,
        "bare": 2,
        "full": 2,
    }
    assert actual["ratio_full"] > 0


@pytest.mark.parametrize("options", [("--tokens", "30"), ("--rounds", "0"), ("--model", "nowhere")])
def test_refuses(model: Path, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script(main, "--model", str(model), *OPTIONS, *options) == 2
    assert "error: " in capsys.readouterr().err
