"""Neural metrics in stage score: their figures stand where those of BLEU do. unbabel-comet is a stand-in."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
from support.neural import calls, metric_model, stand_in, translated_run

from lander_ds.common.errors import ConfigError
from lander_ds.common.files import write_json
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.recipe import Recipe
from lander_ds.config.schema.neural import NeuralConfig
from lander_ds.config.schema.results import EvaluateConfig, SetConfig
from lander_ds.export.card import Exactness, render
from lander_ds.inference.translations import read_translations, write_translations
from lander_ds.report.page import render_report
from lander_ds.report.summary import pair_scores, summarise
from lander_ds.stages import score

PAIRS = ("en-de", "en-fr")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter and two models."""
    root = tmp_path_factory.mktemp("neural")
    stand_in(root / "env")
    metric_model(root / "comet")
    metric_model(root / "kiwi", "referenceless_regression_metric")
    return root


def recipe_of(root: Path, directory: Path) -> tuple[Recipe, RunDirectory]:
    """Two pairs, a test set with a direction that was not trained, two metrics."""
    python = str(root / "env" / "bin" / "python")
    metrics = {name: NeuralConfig(str(root / name), python) for name in ("comet", "kiwi")}
    recipe, run = translated_run(directory, metrics, PAIRS)
    for system in recipe.translate.systems:
        target = run.translations_of(system, "news")
        source = read_translations(run.translations / system / "en-fr.jsonl")[:5]
        if system != "fewshot":
            write_translations(target / "en-es.jsonl", source)
            write_json(target / "losses.json", {})
    sets = {"news": SetConfig("news.jsonl", pairs=("en-es",))}
    return replace(recipe, evaluate=EvaluateConfig(sets)), run


@pytest.fixture(scope="module")
def scored(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, RunDirectory]:
    """A run that was scored."""
    recipe, run = recipe_of(root, tmp_path_factory.mktemp("run"))
    score.run(recipe, run)
    return recipe, run


def test_scores_json(scored: tuple[Recipe, RunDirectory], root: Path) -> None:
    _, run = scored
    scores = json.loads(run.scores.read_text())
    assert scores["neural"] == ["comet", "kiwi"]
    for pair in PAIRS:
        entry = scores["pairs"][pair]
        for system, figures in entry["systems"].items():
            read = read_translations(run.translations / system / f"{pair}.jsonl")
            expected = fmean(len(one.hyp) / (len(one.hyp) + len(one.ref)) for one in read)
            assert figures["comet"] == pytest.approx(expected, rel=1e-12)
            assert figures["comet_mean"] == pytest.approx(expected, rel=0.1)
            assert figures["comet_ci"] > 0
            assert ("p_comet" in figures) == (system != "base")
        assert entry["p_comet"] == entry["systems"]["trained"]["p_comet"] < 0.05
        assert entry["p_kiwi_vs_fewshot"] < 0.05
        assert scores["signatures"][pair]["kiwi"].startswith("nrefs:0|model:kiwi|sha256:")
    means = [scores["pairs"][pair]["systems"]["base"]["comet"] for pair in PAIRS]
    assert scores["mean"]["base"]["comet"] == pytest.approx(fmean(means))
    news = scores["sets"]["news"]
    assert news["directions"]["en-es"]["systems"]["trained"]["p_kiwi"] < 0.05
    assert news["mean"]["untrained"]["trained"]["comet"] > news["mean"]["untrained"]["base"]["comet"]
    # The model is loaded once for all systems, pairs and sets; the set's sentences are those of a pair.
    assert [call.get("samples") for call in calls(root / "comet")] == [None, 3 * 2 * 12]


def test_tables_report_and_card(
    scored: tuple[Recipe, RunDirectory], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run = scored
    score.run(recipe, run)
    scores, summary = json.loads(run.scores.read_text()), summarise(run)
    shown = [f"{scores['pairs']['en-de']['systems'][system]['comet']:.4f}" for system in ("base", "trained")]
    out = capsys.readouterr().out
    assert "comet per pair; gain and p over base" in out
    assert "kiwi per test set; gain and p over base" in out
    assert "…" not in out
    page = render_report(recipe, run)
    figures = pair_scores(scores)
    card = render(
        {
            "base": {"name": "base", "fingerprint": "f"},
            "method": "lander",
            "pairs": PAIRS,
            "recipe": "seed: 1",
            "scores": figures,
            "neural": scores["neural"],
            "signatures": scores["signatures"],
        },
        "routed",
        Exactness.exact(),
    )
    assert "| TER | comet | kiwi |" in card
    for text in (out, page, card):
        assert all(number in text for number in shown)
    assert scores["signatures"]["en-de"]["comet"] in page
    assert scores["signatures"]["en-de"]["comet"] in card
    assert summary["neural"] == ["comet", "kiwi"]
    flat = summary["scores"]["en-de"]
    assert (f"{flat['base_comet']:.4f}", f"{flat['comet']:.4f}") == tuple(shown)
    assert flat["p_comet"] == scores["pairs"]["en-de"]["p_comet"]


def test_what_makes_the_stage_score_again(root: Path, tmp_path: Path) -> None:
    recipe, run = recipe_of(root, tmp_path)
    recipe = replace(recipe, evaluate=EvaluateConfig())
    plain = replace(recipe, score=replace(recipe.score, neural={}))
    score.run(plain, run)
    assert "neural" not in json.loads(run.scores.read_text())
    # As before there were neural metrics.
    assert set(run.read_record("score")["options"]["score"]) == {
        "bootstrap_samples",
        "baseline",
        "ter",
        "tokenizers",
    }
    assert not any(name.startswith("score.neural") for name in run.read_record("score")["inputs"])

    def written(recipe: Recipe) -> int:
        score.run(recipe, run)
        return run.scores.stat().st_mtime_ns

    first = written(recipe)
    assert json.loads(run.scores.read_text())["neural"] == ["comet", "kiwi"]
    faster = {name: replace(config, batch_size=99) for name, config in recipe.score.neural.items()}
    assert written(replace(recipe, score=replace(recipe.score, neural=faster))) == first
    half = {name: replace(config, dtype="float16") for name, config in recipe.score.neural.items()}
    assert written(replace(recipe, score=replace(recipe.score, neural=half))) > first


def test_a_missing_program_is_told_before_anything_is_scored(root: Path, tmp_path: Path) -> None:
    recipe, run = recipe_of(root, tmp_path)
    missing = {"comet": NeuralConfig(str(root / "comet"), "/none/python")}
    with pytest.raises(ConfigError, match=r"^score\.neural\.comet\.python: /none/python cannot be run"):
        score.run(replace(recipe, score=replace(recipe.score, neural=missing)), run)
    assert not run.scores.exists()
