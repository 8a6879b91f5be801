"""benchmarks/parity.py: what it expects of bytes, what it calls a difference, and a whole run on two ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import LARGE, LARGE_LAYERS, LIMITS, main, relative, results, table
from parity_cases import (
    CLIP,
    FAMILIES,
    GRIDS,
    LAYERS,
    QUICK_GRIDS,
    REFERENCE,
    Grid,
    Job,
    Workspace,
    elements_per_part,
    expected_elements,
    jobs_of,
)
from parity_ranks import PeakMemory
from support.scripts import run_script
from transformers import AutoModelForCausalLM

from lander_ds.config.recipe import ModelConfig
from lander_ds.models.loading import build
from lander_ds.models.span import spans, units

STEPS = 4
"""Of the quick run: enough for moments, clipping and gates to be at work in each."""


@pytest.mark.parametrize("family", FAMILIES)
def test_expected_elements_are_those_of_the_model(family: str, tmp_path: Path) -> None:
    plain = AutoModelForCausalLM.from_config(FAMILIES[family]())
    plain.save_pretrained(tmp_path)
    total = sum(parameter.numel() for parameter in plain.parameters())
    before, layers, after = elements_per_part(tmp_path)
    tied = plain.lm_head.weight is plain.get_input_embeddings().weight
    assert before + sum(layers) + after == total + (plain.lm_head.weight.numel() if tied else 0)
    assert expected_elements(tmp_path, (0, LAYERS), ()) == total
    model, description = build(ModelConfig(str(tmp_path)))
    for span in spans((1, 3), LAYERS):
        holding = sum(p.numel() for _, unit in units(model, description, span) for p in unit.parameters())
        assert expected_elements(tmp_path, (span.start, span.stop), ()) == holding
    gate = 8 * 32 + 8 + 8 + 1
    assert expected_elements(tmp_path, (1, 3), (1, 3)) == expected_elements(tmp_path, (1, 3), ()) + gate


def test_a_difference_is_relative_and_never_nan() -> None:
    assert relative([1.0, 2.2], [1.0, 2.0]) == pytest.approx(0.1)
    assert relative([1.0], [1.0, 2.0]) == math.inf
    assert relative([1.0, math.nan], [1.0, 2.0]) == math.inf


def test_a_peak_is_seen_though_it_is_over_at_the_end() -> None:
    with PeakMemory() as memory:
        big = torch.ones(32_000_000)
        big.add_(1.0)
        del big
        torch.ones(100).sum()
    assert 100e6 < memory.growth < 200e6


def test_every_case_is_there_once() -> None:
    jobs = list(jobs_of(("gemma3", "bloom"), GRIDS, (0.0, CLIP)))
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    assert all(Job.from_json(job.to_json()) == job for job in jobs)
    trainings = [job for job in jobs if job.what == "train" and job.grid != REFERENCE]
    assert len(trainings) == 2 * len(GRIDS) * 4
    assert {(grid.topology, grid.stages, grid.data_ranks) for grid in GRIDS} == {
        ("zero3", 1, 2),
        ("zero3", 1, 4),
        ("replicated", 1, 2),
        ("replicated", 1, 4),
        *((("pipeline"), *shape) for shape in ((2, 1), (4, 1), (2, 2))),
        *((("pipeline_zero3"), *shape) for shape in ((2, 1), (2, 2))),
    }
    job = Job("train", "bloom", Grid("pipeline", 2, 2), "sgd", 0.0)
    assert job.name == "bloom, pipeline 2x2 on 4 ranks, sgd, no clipping"
    assert job.reference.name == "bloom, zero3 on 1 rank, sgd, no clipping"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--families", "gemma3,gpt5"], "unknown gpt5"), (["--keep", "."], "exists already")],
)
def test_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script(main, *arguments) == 2
    assert message in capsys.readouterr().err


def _not_ok(actual: dict[str, Any]) -> list[str]:
    return [e.get("name", e.get("case")) for key in LISTS for e in actual[key] if not e["ok"]]


LISTS = ("cases", "weight_bytes", "load_peaks")


@pytest.mark.long
@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_a_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = tmp_path / "work"
    code = run_script(
        main, "--quick", "--steps", str(STEPS), "--timeout", "180", "--json", "--keep", str(work)
    )
    shown = capsys.readouterr()
    assert code == 0, shown.out + shown.err
    actual = json.loads(shown.out)
    assert actual["ok"]
    assert actual["limits"] == LIMITS
    assert [case["name"] for case in actual["cases"]] == [
        f"gemma3, {grid.name}, {optimizer}, clip 0.05"
        for grid in QUICK_GRIDS
        for optimizer in ("sgd", "adamw")
    ]
    for case in actual["cases"]:
        assert case["steps"] == STEPS
        assert case["least_grad_norm"] > CLIP
        assert case["last_loss"] < case["first_loss"]
        assert case["max_rel_loss_diff"] < case["limit"]
        assert case["max_rel_weight_diff"] < case["limit"]
        assert case["max_rel_awareness_diff"] < 1e-5
    assert any(case["max_rel_weight_diff"] > 0 for case in actual["cases"]), "compared with another run"
    assert len(actual["weight_bytes"]) == 2 * 2 * len(QUICK_GRIDS)
    assert len(actual["load_peaks"]) == 2 * len(QUICK_GRIDS)
    assert "all limits kept" in table(actual)

    # The same files with one loss, one shard and one peak changed.
    workspace = Workspace(work)
    jobs = [*jobs_of(("gemma3",), QUICK_GRIDS, (CLIP,), STEPS), *(Job("load", LARGE, g) for g in QUICK_GRIDS)]
    assert not _not_ok(results(workspace, jobs, LARGE_LAYERS))
    changed = Job("train", "gemma3", QUICK_GRIDS[1], "sgd", CLIP, STEPS)
    metrics = workspace.run(changed).metrics
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    records[2]["loss"] *= 1 + 2e-5
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    for what, model, key in (("hold", "gemma3", "weights"), ("load", LARGE, "peak")):
        path = workspace.run(Job(what, model, QUICK_GRIDS[0])).path / "rank-1.json"  # type: ignore[arg-type]
        facts = json.loads(path.read_text())
        path.write_text(json.dumps({**facts, key: facts[key] * 2}))
    broken = results(workspace, jobs, LARGE_LAYERS)
    assert not broken["ok"]
    assert _not_ok(broken) == [changed.name, "gemma3, zero3 on 2 ranks", f"{LARGE}, zero3 on 2 ranks"]
