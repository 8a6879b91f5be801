"""A whole experiment: what all share, trials, cells, an interruption, results that can be computed again."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
from support.commands import preloaded
from support.tiny_run import TinyRun

from lander_ds.cli.main import main
from lander_ds.common.files import read_json, write_json
from lander_ds.common.run_directory import RunDirectory
from lander_ds.experiment.grid import Cell, load_experiment
from lander_ds.experiment.outcome import cell_file, published
from lander_ds.experiment.results import comparisons, texts_of
from lander_ds.experiment.runner import Runner
from lander_ds.training.preemption import Preempted

EXPERIMENT = """\
recipe: {recipe}
run_dir: {run_dir}
baseline: lora
seeds: [1]
equal_time: true
clock: processor
tuning: {{steps: 3, sentences: 2}}
set:
  train.steps: 4
  train.batch_tokens: 96
  score.bootstrap_samples: 50
  select.layers.k: 2
  translate.limit: 4
  translate.max_new_tokens: 8
  translate.shots: 1
  evaluate.sets: {{kept: {{path: {sentences}, pairs: [en-de], limit: 3}}}}
  evaluate.systems: [trained, trained_fewshot]
methods:
  base: {{trained: false, set: {{translate.systems: [base, fewshot], evaluate.systems: [base, fewshot]}}}}
  lora: {{set: {{train.method: lora}}, rate_keys: [train.lr.lora], rates: [1.0e-3]}}
  landermt:
    rate_keys: [train.lr.general, train.lr.specific]
    rates: [1.0e-2]
    equal_time: false
"""


@pytest.fixture(scope="module")
def finished(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of an experiment that has been run."""
    directory = tmp_path_factory.mktemp("experiment")
    file = directory / "small.yaml"
    sentences = tiny_run.root / "valid.en-de.jsonl"
    text = EXPERIMENT.format(recipe=tiny_run.recipe_path, run_dir=directory / "runs", sentences=sentences)
    with preloaded(directory) as lander:
        file.write_text(f"{text}launch: {lander}\n", encoding="utf-8")
        assert main(["experiment", str(file)]) == 0
    file.write_text(text, encoding="utf-8")
    return file


def test_results_hold_every_cell_and_its_comparison(finished: Path) -> None:
    results = read_json(finished.parent / "runs" / "results" / "results.json", "")
    untrained = ["base", "base, few-shot"]
    trained = ["landermt", "landermt, few-shot", "lora", "lora, few-shot"]
    assert [(cell["at"], cell["method"], cell["steps"]) for cell in results["cells"]] == [
        *(("steps", method, None) for method in untrained),
        *(("steps", method, 4) for method in trained),
    ]
    assert [trial["chosen"] for trial in results["trials"]] == [True, True]
    assert results["step_seconds"]["all"].keys() == {"lora", "landermt"}
    assert [(one["a"], one["b"], one["on"]) for one in results["comparisons"]] == [
        ("base", "lora", "test"),
        ("base", "lora", "kept"),
        ("base, few-shot", "lora", "test"),  # which LoRA was not shown examples for
        ("base, few-shot", "lora, few-shot", "kept"),
        ("landermt", "lora", "test"),
        ("landermt", "lora", "kept"),
        ("landermt, few-shot", "lora, few-shot", "kept"),
    ]
    for cell in results["cells"]:
        name, _, shown = cell["method"].partition(", ")
        scores = read_json(
            RunDirectory(finished.parent / "runs" / "steps" / "all" / name / "seed-1").scores, ""
        )
        system = (
            {"base": "base", "few-shot": "fewshot"} if name == "base" else {"few-shot": "trained_fewshot"}
        )
        own = system.get(shown or name, "trained")
        kept = scores["sets"]["kept"]["directions"]["en-de"]["systems"]
        assert cell["sets"]["kept"]["scores"]["en-de"]["chrf"] == kept[own]["chrf"]
        if own == "trained_fewshot":
            assert cell["scores"] == {}
        else:
            assert cell["scores"].keys() == {"en-de", "en-fr", "en-es"}
            assert cell["scores"]["en-de"]["chrf"] == scores["pairs"]["en-de"]["systems"][own]["chrf"]
        assert name == "base" or cell["trained_parameters"] > 0


def test_comparisons_can_be_computed_again(finished: Path) -> None:
    out = finished.parent / "runs" / "results"
    cells = [figures for figures in published(out) if figures["kind"] != "trial"]
    assert (
        comparisons("lora", texts_of(cells, out), out) == read_json(out / "results.json", "")["comparisons"]
    )


def test_all_cells_share_data_and_detection(finished: Path) -> None:
    runs = finished.parent / "runs"
    awareness = {path.read_bytes() for path in runs.rglob("awareness.safetensors")}
    assert len(awareness) == 1
    used = {json.loads(path.read_text())["entry"] for path in runs.rglob("data/prepared.json")}
    assert len(used) == 1


def test_what_is_finished_needs_no_run_directory(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = sorted((finished.parent / "runs" / "results" / "cells").glob("*.json"))
    before = [cell.stat().st_mtime_ns for cell in cells]
    (finished.parent / "runs" / "shared").rename(finished.parent / "runs" / "elsewhere")
    assert main(["experiment", str(finished)]) == 0
    assert [cell.stat().st_mtime_ns for cell in cells] == before
    assert not (finished.parent / "runs" / "shared").exists()
    capsys.readouterr()
    assert main(["experiment", str(finished), "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert all(line.startswith("finished") for line in lines)


def test_trials_leave_no_checkpoints(finished: Path) -> None:
    runs = finished.parent / "runs"
    assert not list((runs / "trials").rglob("checkpoints"))
    assert list((runs / "steps").rglob("checkpoints"))


def test_tables_in_three_formats(finished: Path) -> None:
    out = finished.parent / "runs" / "results"
    for suffix in ("md", "csv", "html"):
        text = (out / f"table.{suffix}").read_text(encoding="utf-8")
        assert "landermt" in text
        assert "At equal steps" in text
    _, test, kept, *_ = (out / "table.md").read_text(encoding="utf-8").split("### ")
    assert (test.split("\n")[0], kept.split("\n")[0]) == ("At equal steps", "At equal steps: test set kept")
    assert "| landermt, few-shot |" in kept
    assert "landermt, few-shot" not in test
    assert "| base, few-shot |" in test


def changed(finished: Path, directory: Path, before: str, after: str) -> Path:
    text = finished.read_text(encoding="utf-8").replace(
        str(finished.parent / "runs"), str(directory / "runs")
    )
    assert before in text
    file = directory / "changed.yaml"
    file.write_text(text.replace(before, after), encoding="utf-8")
    return file


def test_settings_that_cannot_work_are_refused_before_anything_runs(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = changed(finished, tmp_path, "train.steps: 4", "train.stepz: 4")
    assert main(["experiment", str(file)]) == 2
    assert "did you mean train.steps?" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_cell_is_a_command_of_this_interpreter_where_the_experiment_does_not_say_how_to_launch_it(
    finished: Path,
) -> None:
    runner = Runner(load_experiment(finished), Path(load_experiment(finished).recipe))
    command = runner._command(["all"], ["seed=3"], slot=0)
    assert command[:4] == [sys.executable, "-m", "lander_ds", "all"]
    assert command[4:] == ["--recipe", str(runner.recipe), "--set", "seed=3"]


def test_a_launcher_that_fails_is_named_with_its_log(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = changed(finished, tmp_path, "seeds: [1]", "seeds: [1]\nlaunch: 'false {slot}'")
    assert main(["experiment", str(file)]) == 1
    assert f"the log is {tmp_path / 'runs' / 'shared' / 'all' / 'log'}" in capsys.readouterr().err


def test_a_signal_stops_the_cell_too(finished: Path, tmp_path: Path) -> None:
    file = changed(
        finished, tmp_path, "seeds: [1]", "seeds: [1]\nlaunch: 'python -c \"import time; time.sleep(99)\"'"
    )
    (tmp_path / "runs" / "shared" / "all").mkdir(parents=True)
    runner = Runner(load_experiment(file), Path(load_experiment(file).recipe))
    cell = runner.plan()[0]
    before = psutil.Process().children()
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    with pytest.raises(Preempted):
        runner._run_all([cell])
    assert not runner.is_finished(cell)
    assert psutil.Process().children() == before


def test_a_cell_that_another_runner_finishes_meanwhile_is_not_run(finished: Path, tmp_path: Path) -> None:
    experiment = load_experiment(changed(finished, tmp_path, "seeds: [1]", "seeds: [1]"))
    first, second = Runner(experiment, Path(experiment.recipe)).plan()[:2]
    figures = cell_file(tmp_path / "runs" / "results", second)
    figures.parent.mkdir(parents=True)
    # The first cell fails, and while it runs the second one's figures appear.
    file = changed(finished, tmp_path, "seeds: [1]", f"seeds: [1]\nlaunch: sh -c 'touch {figures}; false'")
    runner = Runner(load_experiment(file), Path(experiment.recipe))
    assert runner._run_all([first, second]) == [first]
    assert runner.directory(first).exists()
    assert not runner.directory(second).exists()


def times(out: Path, method: str, seconds: float) -> None:
    """A finished cell at equal steps that says no more than how long its steps took."""
    cell = Cell("steps", method, "all", 1, None, None)
    write_json(cell_file(out, cell), {**asdict(cell), "step_seconds": {"processor": seconds}})


def test_cells_at_equal_time_follow_from_those_at_equal_steps(finished: Path, tmp_path: Path) -> None:
    """Also of a control, which no trial has timed: it takes part once its own steps are known to differ."""
    control = "  control: {rate_keys: [train.lr.general], tuned_as: landermt}\n"
    file = changed(finished, tmp_path, "    equal_time: false\n", f"    equal_time: false\n{control}")
    experiment = load_experiment(file)
    runner = Runner(experiment, Path(experiment.recipe))
    rates = {("control", "all"): 1e-2}
    assert runner._ready("time", rates) == []
    assert [cell.method for cell in runner._comparison("time", rates)] == ["control"]
    times(runner.out, "lora", 1.0)
    times(runner.out, "control", 0.5)
    (cell,) = runner._ready("time", rates)
    assert runner._decided(cell).steps == 8
    times(runner.out, "control", 0.99)
    assert runner._comparison("time", rates) == []
