"""The figures that `lander summary` prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from support.sample_run import PAIRS, sample_recipe, sample_run

from lander_ds.common.errors import ArtefactError
from lander_ds.common.files import write_json
from lander_ds.common.run_directory import RunDirectory
from lander_ds.report.page import render_report
from lander_ds.report.summary import score_tables, stage_seconds, summarise, summary_table


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A finished run."""
    return sample_run(tmp_path_factory.mktemp("summary"), sentences=20)[1]


def text(table: object, width: int = 80) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def test_figures(run: RunDirectory) -> None:
    summary = summarise(run)
    assert json.loads(json.dumps(summary)) == summary
    assert summary["trained_parameters"] == 15_400_000
    assert summary["total_parameters"] == 268_098_176
    assert summary["ranks"] == 2
    assert summary["optimizer_bytes_per_rank"] == [92_400_000, 92_400_000]
    assert summary["gradient_bytes_per_rank"] == [15_400_000, 15_400_000]
    assert summary["peak_memory_bytes_per_rank"] == [2_100_000_000, 2_050_000_000]
    assert summary["frozen_unchanged"] is True
    assert set(summary["scores"]) == set(PAIRS)
    scores = json.loads(run.scores.read_text())["pairs"]
    for pair, figures in summary["scores"].items():
        systems = scores[pair]["systems"]
        for metric in ("bleu", "chrf", "chrfpp", "ter"):
            assert figures[f"base_{metric}"] == systems["base"][metric]
            assert figures[f"fewshot_{metric}"] == systems["fewshot"][metric]
            assert figures[metric] == systems["trained"][metric]
        for name in ("p_bleu", "p_chrf", "p_chrfpp"):
            assert figures[name] == scores[pair][name]
    assert list(summary["stage_seconds"]) == ["detect", "train", "translate.base", "score"]
    assert summary["artefacts"]["scores"] == str(run.scores)


def test_what_has_not_run_is_null(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.record("prepare", {}, {}, [], 1.5)
    summary = summarise(run)
    assert summary["trained_parameters"] is None
    assert summary["frozen_unchanged"] is None
    assert summary["scores"] == {}
    assert stage_seconds(run) == {"prepare": 1.5}
    assert "prepare" in text(summary_table(summary))


def test_only_the_trained_system_was_scored(run: RunDirectory, tmp_path: Path) -> None:
    scores = json.loads(run.scores.read_text())
    for entry in scores["pairs"].values():
        entry["systems"] = {"trained": entry["systems"]["trained"]}
        entry.update(p_bleu=None, p_chrf=None, p_chrfpp=None)
    partial = RunDirectory(tmp_path)
    write_json(partial.scores, scores)
    figures = summarise(partial)["scores"]["en-de"]
    assert figures["base_chrf"] is None
    assert figures["p_chrf"] is None
    assert figures["chrf"] > 0
    table = text(score_tables(summarise(partial)["scores"], [])[0])
    assert "trained" in table
    assert "base" not in table


def with_given_baseline(run: RunDirectory) -> RunDirectory:
    """Add a system of `score.baseline`, as good as the few-shot one."""
    scores = json.loads(run.scores.read_text())
    for part in (*(entry["systems"] for entry in scores["pairs"].values()), scores["mean"]):
        part["baseline"] = part["fewshot"]
    systems = ["baseline", *scores["systems"]]
    write_json(
        run.scores, scores | {"baseline": "baseline", "baseline_file": "mt.{pair}", "systems": systems}
    )
    return run


def test_another_systems_baseline(tmp_path: Path) -> None:
    run = with_given_baseline(sample_run(tmp_path, sentences=20)[1])
    summary = summarise(run)
    assert summary["baseline"] == "baseline"
    figures = summary["scores"]["en-cs"]
    assert figures["baseline_chrf"] == figures["fewshot_chrf"] > figures["base_chrf"]
    # All four systems fit into 80 columns, and the gain is the one over the file.
    table = text(score_tables(summary["scores"], [])[0])
    assert "…" not in table
    (line,) = [line for line in table.splitlines() if line.startswith("en-cs")]
    assert len(line.split()) == 1 + 4 * 2 + 3
    assert f"{figures['chrf'] - figures['baseline_chrf']:+.1f}" in line.split()
    assert "mt.{pair}" in render_report(sample_recipe(tmp_path), run)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="no stage has finished there"):
        summarise(RunDirectory(tmp_path))
    with pytest.raises(ArtefactError, match="does not exist: give the run_dir"):
        summarise(RunDirectory(tmp_path / "absent"))


def test_a_damaged_file_is_named(run: RunDirectory, tmp_path: Path) -> None:
    damaged = RunDirectory(tmp_path)
    damaged.scores.write_text(run.scores.read_text()[:100])
    with pytest.raises(ArtefactError, match=r"scores\.json is not valid JSON"):
        summarise(damaged)


def test_tables_fit_into_80_columns(run: RunDirectory) -> None:
    summary = summarise(run)
    table = text(score_tables(summary["scores"], [])[0])
    assert "…" not in table
    for pair, figures in summary["scores"].items():
        (line,) = [line for line in table.splitlines() if line.startswith(pair)]
        gain = figures["chrf"] - figures["base_chrf"]
        shown = [figures["base_bleu"], figures["fewshot_chrf"], figures["chrf"]]
        assert all(f"{value:.1f}" in line.split() for value in shown)
        assert f"{gain:+.1f}" in line.split()
        assert f"{figures['p_chrf']:.3f}" in line.split()
    assert any(line.startswith("mean") for line in table.splitlines())
    assert "15,400,000" in text(summary_table(summary), 200)
