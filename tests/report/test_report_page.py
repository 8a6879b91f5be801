"""The report renders from all artefacts and from any part of them, and needs nothing from outside."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support.sample_run import PAIRS, sample_recipe, sample_run

from lander_ds.common.errors import ArtefactError
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.recipe import Recipe
from lander_ds.inference.translations import read_translations, write_translations
from lander_ds.report.page import render_report
from lander_ds.stages import report

PLOTS = (
    "chrF2 per pair",
    "Relevance of the layers",
    "Awareness per layer and pair",
    "Awareness of single neurons",
    "Overlap of the pairs&#39; neurons",
    "Banks",
    "Losses",
    "Learning rates and gradient norm",
    "Gates during training",
    "Gates at the end",
)


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, RunDirectory]:
    """A run with every artefact."""
    return sample_run(tmp_path_factory.mktemp("complete"))


@pytest.fixture(scope="module")
def page(complete: tuple[Recipe, RunDirectory]) -> str:
    """Its report."""
    return render_report(*complete)


@pytest.fixture
def copy(complete: tuple[Recipe, RunDirectory], tmp_path: Path) -> RunDirectory:
    """A copy of it that a test may damage."""
    return RunDirectory(shutil.copytree(complete[1].path, tmp_path / "run"))


@pytest.fixture
def light(copy: RunDirectory) -> RunDirectory:
    """A copy with few plots, which take the time."""
    for path in (copy.awareness, copy.selection, copy.metrics):
        path.unlink()
    return copy


def titles(page: str) -> list[str]:
    return re.findall(r"<h3>(.*?)</h3>", page)


def test_a_complete_report(page: str, complete: tuple[Recipe, RunDirectory]) -> None:
    assert titles(page) == list(PLOTS)
    assert "Not in this report yet" not in page
    assert "15,400,000" in page
    assert "5.74 % of all" in page
    assert "92.4 MB" in page
    scores = json.loads(complete[1].scores.read_text())
    assert f"{scores['pairs']['en-cs']['systems']['trained']['chrf']:.1f}" in page
    assert scores["signatures"]["en-cs"]["bleu"] in page
    assert page.count('<dl class="example">') == 5 * len(PAIRS)
    assert "test overlap normalised 27" in page


def test_the_report_loads_nothing(page: str) -> None:
    loaded = re.findall(r"""(?:src|href|action|data)\s*=\s*["']?([^"'>\s]+)""", page)
    assert loaded
    assert all(link.startswith(("data:image/svg+xml;base64,", "#")) for link in loaded)
    assert not re.search(r"<(script|link|iframe|object)\b|@import|url\(", page)


def test_texts_are_escaped(light: RunDirectory, complete: tuple[Recipe, RunDirectory]) -> None:
    path = light.translations / "trained" / "en-de.jsonl"
    attack = "<script>alert('x')</script> & \"quotes\""
    write_translations(path, [replace(item, hyp=attack) for item in read_translations(path)])
    page = render_report(complete[0], light)
    assert "<script" not in page
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; &#34;quotes&#34;" in page


@pytest.mark.parametrize(
    ("removed", "stages", "plots_left"),
    [
        (("awareness.safetensors",), {"detect"}, 6),
        (("selection.safetensors", "metrics.jsonl", "translations"), {"select", "train", "translate"}, 5),
        (("training.json", "scores.json", "data", "metrics.jsonl"), {"train", "score", "prepare"}, 5),
        (("awareness.safetensors", "metrics.jsonl", "scores.json"), {"detect", "train", "score"}, 1),
    ],
)
def test_missing_artefacts_are_named(
    removed: tuple[str, ...],
    stages: set[str],
    plots_left: int,
    copy: RunDirectory,
    complete: tuple[Recipe, RunDirectory],
) -> None:
    for name in removed:
        path = copy.path / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    page = render_report(complete[0], copy)
    assert set(re.findall(r"\(stage (\w+) has not run\)", page)) == stages
    assert len(titles(page)) == plots_left


def test_partial_scores_and_a_training_without_gates(
    copy: RunDirectory, complete: tuple[Recipe, RunDirectory]
) -> None:
    scores = json.loads(copy.scores.read_text())
    for entry in scores["pairs"].values():
        del entry["systems"]["base"], entry["systems"]["fewshot"], entry["systems"]["trained"]["ter"]
        entry["off_target_reference"] = entry["systems"]["trained"]["off_target"] = None
        entry.update(p_bleu=None, p_chrf=None)
    scores |= {"baseline": None, "systems": ["trained"], "mean": {"trained": scores["mean"]["trained"]}}
    copy.awareness.unlink()
    copy.scores.write_text(json.dumps(scores))
    records = [json.loads(line) for line in copy.metrics.read_text().splitlines()]
    copy.metrics.write_text("".join(json.dumps(record | {"gates": {}}) + "\n" for record in records))
    page = render_report(complete[0], copy)
    assert not any(title.startswith("Gates") for title in titles(page))
    assert "over the base" not in page


def test_one_pair(tmp_path: Path) -> None:
    page = render_report(*sample_run(tmp_path, pairs=("en-de",), sentences=10))
    assert "every trained neuron is specific to it" in page
    assert "Overlap of the pairs&#39; neurons" not in titles(page)


def test_a_metrics_line_cut_short_is_left_out_and_a_damaged_one_is_named(
    copy: RunDirectory, complete: tuple[Recipe, RunDirectory]
) -> None:
    copy.awareness.unlink()
    whole = copy.metrics.read_text()
    copy.metrics.write_text(whole + '{"step": 61, "lo')
    assert "Losses" in titles(render_report(complete[0], copy))
    copy.metrics.write_text("what?\n" + whole)
    with pytest.raises(ArtefactError, match=r"metrics\.jsonl, line 1 is not a metrics record"):
        render_report(complete[0], copy)


def test_validations_that_translated_have_a_plot_of_their_own(
    copy: RunDirectory, complete: tuple[Recipe, RunDirectory]
) -> None:
    for path in (copy.awareness, copy.selection):
        path.unlink()
    lines = [json.loads(line) for line in copy.metrics.read_text().splitlines()]
    validation = next(line for line in lines if "valid_loss" in line)
    # As of a pair without validation data: it has no figure.
    validation |= {"valid_chrf": {PAIRS[0]: 31.5}, "valid_chrf_mean": 31.5}
    validation |= {"valid_comet": {PAIRS[0]: 0.8}, "valid_comet_mean": 0.8}
    copy.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = titles(render_report(complete[0], copy))
    assert {"chrF of the validation sentences", "comet of the validation sentences"} <= set(shown)


def test_the_stage_writes_once_and_again_when_something_changed(
    light: RunDirectory, complete: tuple[Recipe, RunDirectory]
) -> None:
    recipe = complete[0]
    report.run(recipe, light)
    stamp = light.report.stat().st_mtime_ns
    report.run(recipe, light)
    assert light.report.stat().st_mtime_ns == stamp
    light.scores.unlink()
    report.run(recipe, light)
    assert light.report.stat().st_mtime_ns != stamp


def test_an_empty_run_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="no stage has finished there"):
        render_report(sample_recipe(tmp_path), RunDirectory(tmp_path))
