"""Scores of sentence pairs in corpora: what is below a threshold is dropped, and what is no number refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from support.data_helpers import MakeRecipe

from lander_ds.common.errors import DataError
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.schema.data import ColumnConfig, CorpusConfig, DataConfig, FilterConfig
from lander_ds.data.prepared import prepared_options
from lander_ds.data.sources.corpus import resolve
from lander_ds.data.sources.readers import read
from lander_ds.data.sources.rows import Row
from lander_ds.stages import prepare

ROWS = [("one", "eins", 0.9), ("two", "zwei", 0.5), ("three", "drei", 0.49), ("four", "vier", 1)]
COLUMNS = ColumnConfig(scores=("qe",))


def write(path: Path, rows: list[tuple[str, str, Any]]) -> Path:
    """A corpus of (source, target, score) in the format of its name."""
    named = [{"src": src, "tgt": tgt, "qe": score} for src, tgt, score in rows]
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in named))
        case ".tsv":
            lines = [("src", "tgt", "qe"), *rows]
            path.write_text("".join("\t".join(map(str, line)) + "\n" for line in lines))
        case ".parquet":
            datasets.Dataset.from_list(named).to_parquet(str(path))
    return path


def rows_of(path: Path, columns: ColumnConfig = COLUMNS, **corpus: Any) -> list[Row]:
    config = CorpusConfig(str(path), columns=columns, **corpus)
    (resolved,) = resolve(DataConfig(("en-de",), (config,)))
    return [item for item in read(resolved) if isinstance(item, Row)]


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("name", ["c.jsonl", "c.tsv", "c.parquet"])
def test_every_format_has_them(tmp_path: Path, name: str, swap: bool) -> None:
    rows = rows_of(write(tmp_path / name, [(a, b, float(c)) for a, b, c in ROWS]), swap=swap)
    assert [dict(row.scores) for row in rows] == [{"qe": score} for _, _, score in ROWS]
    assert rows[0].src == ("eins" if swap else "one")


def test_by_number_and_nested(tmp_path: Path) -> None:
    path = tmp_path / "c.tsv"
    path.write_text("one\teins\t0.25\t-3\n")
    (row,) = rows_of(path, ColumnConfig("0", "1", scores=("2", "3")))
    assert row.scores == (("2", 0.25), ("3", -3.0))
    path = tmp_path / "c.jsonl"
    path.write_text('{"src": "one", "tgt": "eins", "meta": {"qe": "0.5"}}\n')
    assert rows_of(path, ColumnConfig(scores=("meta.qe",)))[0].scores == (("meta.qe", 0.5),)


@pytest.mark.parametrize("score", [None, "", "high", True, [0.5], float("nan"), float("inf")])
def test_what_is_no_number(tmp_path: Path, score: Any) -> None:
    path = write(tmp_path / "c.jsonl", [*ROWS, ("five", "fünf", score)])
    with pytest.raises(
        DataError,
        match=r"c\.jsonl: line 5: the score 'qe' is .*, which is no finite number: .*data\.corpora\[0\]\.columns\.scores",
    ):
        rows_of(path)


def test_empty_cells_and_missing_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "c.tsv", [*ROWS, ("five", "fünf", "")])
    with pytest.raises(DataError, match=r"c\.tsv: line 6: the score 'qe' is '', which is no finite number"):
        rows_of(path)
    with pytest.raises(DataError, match=r"c\.tsv: line 1: no column 'bleurt' in the header"):
        rows_of(path, ColumnConfig(scores=("bleurt",)))
    path = write(tmp_path / "c.jsonl", ROWS)
    with pytest.raises(DataError, match=r"c\.jsonl: line 1: the score 'bleurt' is not there"):
        rows_of(path, ColumnConfig(scores=("bleurt",)))
    path = write(tmp_path / "c.parquet", [("one", "eins", 0.5), ("two", "zwei", None)])
    with pytest.raises(DataError, match=r"c\.parquet: line 2: the score 'qe' is None"):
        rows_of(path)


def test_files_without_columns_have_none(tmp_path: Path) -> None:
    for name in ("news.en", "news.de"):
        (tmp_path / name).write_text("text\n")
    with pytest.raises(DataError, match=r"data\.corpora\[0\]\.columns\.scores: .* has no columns"):
        rows_of(tmp_path / "news")


def test_low_scores_are_dropped_and_counted(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    # The better one of two equal pairs stays, although it comes second.
    rows = [("two", "zwei", 0.1), *ROWS]
    scored = CorpusConfig(str(write(tmp_path / "a.jsonl", rows)), columns=COLUMNS)
    plain = CorpusConfig(str(write(tmp_path / "b.jsonl", [("six", "sechs", 0.0)])))
    recipe = make_recipe(
        scored, plain, detect_examples=1, filters=FilterConfig(min_score={"qe": 0.5}), max_length=64
    )
    run = RunDirectory(recipe.run_dir)
    prepare.run(recipe, run)
    counts = json.loads((run.data / "statistics.json").read_text())["en-de"]["train"]
    assert (counts["read"], counts["dropped"]) == (6, {"low_score": 2})
    rejected = [json.loads(line) for line in (run.data / "rejected.jsonl").read_text().splitlines()]
    assert [(row["line"], row["reason"]) for row in rejected] == [(1, "low_score"), (4, "low_score")]


def test_recipes_without_scores_are_recorded_as_before_there_were_any(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(CorpusConfig("c.jsonl"))
    data = prepared_options(recipe)["data"]
    assert "min_score" not in data["filters"]
    assert set(data["corpora"][0]["columns"]) == {"src", "tgt", "src_lang", "tgt_lang"}
    scored = replace(recipe.data, corpora=(CorpusConfig("c.jsonl", columns=COLUMNS),))
    assert prepared_options(replace(recipe, data=scored)) != prepared_options(recipe)
