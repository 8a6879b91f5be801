"""Metrics without references as filters: what they judge, what they drop, and that nothing is judged twice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.data_helpers import MakeRecipe
from support.neural import calls, metric_model, stand_in

from lander_ds.common.errors import ConfigError, ModelError
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.recipe import Recipe
from lander_ds.config.schema.data import CorpusConfig, FilterConfig
from lander_ds.config.schema.neural import QualityConfig
from lander_ds.data import quality
from lander_ds.data.prepared import prepared_options
from lander_ds.data.quality import Judge, judged
from lander_ds.data.sources.rows import Rejection, Row
from lander_ds.stages import prepare

# The stand-in scores len(tgt) / (len(tgt) + len(src)): one half where both are as long.
ROWS = [
    ("a house", "ein Haus"),
    ("a very large house", "Haus"),
    ("the garden", "der Garten"),
    ("a tree in the garden", "Baum"),
    ("some water", "etwas Wasser"),
]
SHORT = [1, 3]
"""Of the rows, those whose target says too little."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("quality")
    stand_in(root / "env")
    metric_model(root / "comet")
    metric_model(root / "damaged", "referenceless_regression_metric", content="damaged")
    return root


def recipe_of(root: Path, model: Path, make_recipe: MakeRecipe, directory: Path, **corpus: Any) -> Recipe:
    for name, rows in (("train", ROWS), ("test", [("an old clock", "Uhr")])):
        lines = (json.dumps({"src": src, "tgt": tgt}) + "\n" for src, tgt in rows)
        (directory / f"{name}.jsonl").write_text("".join(lines))
    corpora = (
        CorpusConfig(str(directory / "train.jsonl"), **corpus),
        CorpusConfig(str(directory / "test.jsonl"), split="test"),
    )
    kiwi = QualityConfig(str(model), str(root / "env" / "bin" / "python"), min=0.4)
    return make_recipe(*corpora, detect_examples=1, filters=FilterConfig(quality={"kiwi": kiwi}))


def statistics(run: RunDirectory) -> dict[str, dict[str, Any]]:
    """What became of the lines, by split."""
    of: dict[str, dict[str, Any]] = json.loads((run.data / "statistics.json").read_text())["en-de"]
    return of


def test_it_drops_counts_and_records(root: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    model = metric_model(tmp_path / "kiwi", "referenceless_regression_metric")
    recipe = recipe_of(root, model, make_recipe, tmp_path)
    run = RunDirectory(tmp_path / "run")
    prepare.run(recipe, run)
    of = statistics(run)
    counts = of["train"]
    assert (counts["read"], counts["dropped"]) == (5, {"low_quality": 2})
    assert counts["kept"] + of["detect"]["kept"] == 3
    assert of["test"]["kept"] == 1, "a test stays what it is"
    rejected = [json.loads(line) for line in (run.data / "rejected.jsonl").read_text().splitlines()]
    assert [(row["line"], row["reason"]) for row in rejected] == [
        (number + 1, "low_quality") for number in SHORT
    ]
    assert rejected[0]["text"] == "kiwi 0.1818: a very large house | Haus"
    asked = [call["samples"] for call in calls(model) if "samples" in call]
    assert asked == [5], "each once, and no test"
    # Another threshold is another entry, of the same scores.
    kiwi = replace(recipe.data.filters.quality["kiwi"], min=0.1)
    laxer = replace(recipe, data=replace(recipe.data, filters=FilterConfig(quality={"kiwi": kiwi})))
    prepare.run(laxer, run)
    assert statistics(run)["train"]["dropped"] == {}
    assert [call["samples"] for call in calls(model) if "samples" in call] == asked


def test_a_limit_counts_what_passes(root: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    model = metric_model(tmp_path / "kiwi", "referenceless_regression_metric")
    recipe = recipe_of(root, model, make_recipe, tmp_path, limit=3)
    run = RunDirectory(tmp_path / "run")
    prepare.run(recipe, run)
    assert statistics(run)["train"]["kept"] + statistics(run)["detect"]["kept"] == 3


def test_another_model_is_other_data(root: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    model = metric_model(tmp_path / "kiwi", "referenceless_regression_metric")
    recipe = recipe_of(root, model, make_recipe, tmp_path)
    run = RunDirectory(tmp_path / "run")
    prepare.run(recipe, run)
    first = (run.data / "prepared.json").read_text()
    (model / "checkpoints" / "model.ckpt").write_text("other weights")
    prepare.run(recipe, run)
    assert (run.data / "prepared.json").read_text() != first


def test_without_one_nothing_is_otherwise(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Hashes of data prepared before there were such filters."""
    (tmp_path / "train.jsonl").write_text('{"src": "a house", "tgt": "ein Haus"}\n')
    recipe = make_recipe(CorpusConfig(str(tmp_path / "train.jsonl")))
    assert "quality" not in prepared_options(recipe)["data"]["filters"]


def test_what_is_refused(root: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = recipe_of(root, root / "comet", make_recipe, tmp_path)
    with pytest.raises(ConfigError, match=r"data\.filters\.quality\.kiwi\.model: .* reads references"):
        prepare.run(recipe, RunDirectory(tmp_path / "run"))
    recipe = recipe_of(root, root / "gone", make_recipe, tmp_path)
    with pytest.raises(ModelError, match=r"data\.filters\.quality\.kiwi\.model: .*gone does not exist"):
        prepare.run(recipe, RunDirectory(tmp_path / "run"))
    recipe = recipe_of(root, root / "damaged", make_recipe, tmp_path)
    with pytest.raises(ModelError, match=r"data\.filters\.quality\.kiwi: .*the weights are damaged"):
        prepare.run(recipe, RunDirectory(tmp_path / "run"))
    assert not list((tmp_path / "run").rglob("prepared.json")), "nothing half-written"


def test_every_judge_sees_what_those_before_it_let_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "TOGETHER", 3)
    rows = [Row("f", number, f"s{number}", f"t{number}") for number in range(8)]
    seen: list[list[int]] = []

    def scores(rows: Any) -> list[float]:
        seen.append([row.line for row in rows])
        return [float(row.line) for row in rows]

    def even(rows: Any) -> list[float]:
        return [1.0 - row.line % 2 for row in rows]

    dropped: list[Rejection] = []
    judges = [Judge("even", 0.5, even), Judge("late", 3.0, scores)]
    assert [row.line for row in judged(rows, judges, dropped.append)] == [4, 6]
    assert seen == [[0, 2], [4], [6]]
    assert [one.line for one in dropped] == [1, 0, 2, 3, 5, 7]
