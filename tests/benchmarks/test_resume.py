"""benchmarks/resume.py: what it is asked, its limits, and a small run of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import resume
from resume import LIMITS, PLACES, breaches, parse, table
from support.scripts import run_script


def case(saved: str, resumed: str, optimizer: str, loss: float, bitwise: bool) -> dict[str, Any]:
    return {
        "saved": saved,
        "resumed": resumed,
        "optimizer": optimizer,
        "max_rel_loss_diff": loss,
        "max_rel_weight_diff": loss,
        "bitwise": bitwise,
    }


def test_the_places() -> None:
    names = [
        "zero3 x1",
        "zero3 x2",
        "zero3 x4",
        "replicated x2",
        "pipeline 2x1",
        "pipeline 2x2",
        "pipeline_zero3 2x2",
    ]
    assert list(PLACES) == parse([]).places == names
    assert [placement.ranks for placement in PLACES.values()] == [1, 2, 4, 2, 2, 4, 4]
    assert parse(["--places", "pipeline 2x2,zero3 x1"]).places == ["pipeline 2x2", "zero3 x1"]


@pytest.mark.parametrize(
    "arguments", [["--places", "zero3 x3"], ["--optimizers", "adam"], ["--rounds", "-1"]]
)
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_limits() -> None:
    assert LIMITS == {"adamw": 1e-4, "sgd": 1e-5}
    good = [
        case("zero3 x1", "zero3 x1", "sgd", 0.0, True),
        case("zero3 x1", "zero3 x2", "sgd", 9e-6, False),
        case("zero3 x1", "zero3 x2", "adamw", 9e-5, False),
    ]
    assert breaches({"cases": good, "save_overhead": 1.09}) == []
    bad = [
        case("zero3 x1", "zero3 x1", "sgd", 1e-8, False),
        case("zero3 x1", "zero3 x2", "sgd", 2e-5, False),
        case("zero3 x1", "zero3 x2", "adamw", 2e-4, False),
    ]
    assert breaches({"cases": bad, "save_overhead": 1.2}) == [
        "sgd, saved in zero3 x1, resumed in zero3 x1: not bitwise equal",
        "sgd, saved in zero3 x1, resumed in zero3 x2: losses differ by 2.0e-05",
        "adamw, saved in zero3 x1, resumed in zero3 x2: losses differ by 2.0e-04",
        "saving every 10 steps takes 1.20 times as long as not saving",
    ]


def test_the_table() -> None:
    names = ("zero3 x1", "zero3 x2")
    cases = [case(a, b, "sgd", 0.0 if a == b else 4e-8, a == b) for a in names for b in names]
    rows = [line.split() for line in table({"cases": cases, "save_overhead": 1.0417}).splitlines()]
    assert ["zero3", "x1", "=", "4.0e-08"] in rows
    assert ["zero3", "x2", "4.0e-08", "="] in rows
    assert ["save_overhead", "1.042"] in rows


@pytest.mark.long
@pytest.mark.distributed
def test_a_small_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = {"SAVED_AT": 4, "STEPS": 8, "WIDTH": 64, "NEURONS": 512, "BATCH_TOKENS": 192}
    for name, value in small.items():
        monkeypatch.setattr(resume, name, value)
    places = ["--places", "zero3 x1,pipeline 2x1", "--optimizers", "adamw", "--rounds", "1", "--json"]
    code = run_script(resume.main, *places)
    shown = capsys.readouterr()
    assert shown.out, shown.err
    actual = json.loads(shown.out)
    cases = {(c["saved"], c["resumed"]): c for c in actual["cases"]}
    assert len(cases) == 4
    # One round on a busy machine says nothing about the time of a save.
    assert breaches({"cases": actual["cases"]}) == []
    assert actual["save_overhead"] > 0.0
    assert actual["save_overhead_foreground"] > 0.0
    assert actual["checkpoint_bytes"] > 1_000_000
    assert code == (1 if breaches(actual) else 0)
