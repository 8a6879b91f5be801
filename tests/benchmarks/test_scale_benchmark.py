"""benchmarks/scale.py: what it computes, and a run on tiny models."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import deepspeed
import pytest
import step
from figures import Measured
from scale import Size, cases, main, parse, predicted, sizes, table, workload_of
from support.scripts import run_script
from support.worlds import server
from systems import work
from turns import Facts, StepTime, Turns, Work

OPTIONS = ("--tokens", "32", "--length", "8", "--width", "32", "--steps", "1")


def measured(seconds: list[float], peak: int) -> Measured:
    return Measured([StepTime(9.0, value) for value in seconds], [Facts(1, 1, 1.0, peak, "steps")])


def test_the_base_case_comes_first() -> None:
    assert list(sizes("pairs", Size())) == ["pairs=2", "pairs=8", "pairs=32"]
    assert sizes("depth", Size(width=8))["depth=16"] == Size(depth=16, width=8)


def test_everything_is_compared_with_the_first_case() -> None:
    plans = {"depth=4": {"step": 10.0, "memory": 100}, "depth=8": {"step": 15.0, "memory": 130}}
    taken = {"depth=4": measured([2.0, 9.0, 1.0], 1000), "depth=8": measured([2.5], 1050)}
    first, second = cases(taken, plans)
    assert first["measured"] == first["predicted"] == {"step": 1.0, "memory": 0}
    assert second["measured"] == {"step": 1.25, "memory": 50}
    assert second["predicted"] == {"step": 1.5, "memory": 30}
    assert table({"cases": [first, second]}).splitlines()[-1].split() == [
        "depth=8",
        "1.25",
        "1.50",
        "0",
        "0",
        "2.500",
    ]


def test_the_planner_counts_no_more_for_more_pairs(tmp_path: Path) -> None:
    plans = [
        predicted("lander", workload_of(size, parse(list(OPTIONS)), tmp_path / name), tmp_path)
        for name, size in (sizes("pairs", Size(width=32)) | sizes("ranks", Size(width=32))).items()
    ]
    base, _, many, again, two, _ = (plan["step"] for plan in plans)
    assert base == many == again == two / 2


def _through_gloo(job: Work, own_turns: Turns) -> None:
    """Let a rank work without DeepSpeed's own collectives, which a C++ compiler would make first, for minutes."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    job(own_turns)


@pytest.mark.distributed
def test_a_whole_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("multiprocessing.get_context", lambda method=None: server())
    monkeypatch.setattr(step, "work", lambda *arguments: partial(_through_gloo, work(*arguments)))
    code = run_script(main, "--axes", "pairs", *OPTIONS, "--json")
    shown = capsys.readouterr()
    assert code == 0, shown.err
    actual = json.loads(shown.out)
    assert [case["name"] for case in actual["cases"]] == ["pairs=2", "pairs=8", "pairs=32"]
    assert actual["pairs_ratio"] == actual["cases"][-1]["measured"]["step"] > 0
    assert all(case["predicted"]["step"] == 1.0 for case in actual["cases"])


@pytest.mark.parametrize("options", [("--tokens", "30"), ("--steps", "0"), ("--width", "12")])
def test_refuses(options: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script(main, *OPTIONS, *options) == 2
    assert "error: " in capsys.readouterr().err
