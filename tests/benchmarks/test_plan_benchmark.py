"""Predictions of `lander plan` against real tensors."""

from __future__ import annotations

import json

import plan
import pytest
from plan import Case, validate


@pytest.mark.long
@pytest.mark.distributed
def test_predictions_are_what_ranks_hold() -> None:
    cases = validate(None, {1: ((1, 1),), 2: ((2, 1),)})
    quantities = {(case.case.split()[0], case.case.split()[2], case.quantity) for case in cases}
    for model in ("llama", "bloom"):
        for topology in ("zero3", "replicated", "pipeline", "pipeline_zero3"):
            for quantity in ("weights", "gradients", "optimizer", "checkpoint"):
                assert (model, topology, quantity) in quantities
        assert (model, "zero3", "activations") in quantities
    for case in cases:
        assert case.measured > 0 or case.predicted == 0, case
        if case.quantity in ("weights", "gradients", "optimizer"):
            assert case.predicted == case.measured, case
        assert case.within, case


def test_the_exit_code_tells_a_prediction_that_is_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = Case("a", "weights", 104, 100), Case("b", "weights", 106, 100)
    monkeypatch.setattr(plan, "validate", lambda model: [good])
    assert plan.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "cases": [{"case": "a", "quantity": "weights", "predicted": 104, "measured": 100}]
    }
    monkeypatch.setattr(plan, "validate", lambda model: [good, bad])
    assert plan.main([]) == 1
    assert "6.00 %" in capsys.readouterr().out


def test_errors_are_relative_to_what_was_measured() -> None:
    assert Case("a", "gradients", 0, 0).within
    assert not Case("a", "gradients", 1, 0).within
    assert Case("a", "gradients", 95, 100).error == pytest.approx(0.05)
