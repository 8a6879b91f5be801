"""`columns.rejected`: a worse translation beside every translation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.data_helpers import MakeRecipe, write_jsonl

from lander_ds.common.errors import DataError
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.schema.data import ColumnConfig, CorpusConfig, FilterConfig
from lander_ds.data.prepared import PreparedData
from lander_ds.stages import prepare

WORSE = ColumnConfig(rejected="worse")


def test_preparation(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "train.jsonl",
        [
            ("One house.", "Ein Haus.", "Ein Huhn."),
            ("One house.", "Ein Haus.", "Hausen."),
            ("One house.", "Ein Haus.", "Hausen."),
            ("One tree.", "Ein Baum.", "Ein Baum. "),
            ("One lake.", "Ein See.", ""),
            ("One road.", "Eine Straße.", 3),
            ("One cat.", "Eine Katze.", "Eine Katze, " + "sehr " * 60),
        ],
        ("src", "tgt", "worse"),
    )
    recipe = make_recipe(
        CorpusConfig(str(path), columns=WORSE), pairs=("en-de",), detect_examples=0, max_length=60
    )
    run = RunDirectory(recipe.run_dir)
    prepare.run(recipe, run)
    counts = json.loads((run.data / "statistics.json").read_text())["en-de"]["train"]
    assert counts["kept"] == 2
    assert counts["dropped"] == dict.fromkeys(
        ("duplicate", "no_preference", "empty", "malformed", "too_many_tokens"), 1
    )
    (split,) = PreparedData.load(run, recipe).split("train").values()
    (ids, prompt), worse = split.tokens(0), split.rejected(0)
    assert worse is not None
    assert (worse[:prompt] == ids[:prompt]).all()
    assert worse[prompt:].tolist() != ids[prompt:].tolist()
    assert split.rejected_lengths.tolist() == [len(split.rejected(index)) for index in range(2)]  # type: ignore[arg-type]
    plain = replace(recipe, data=replace(recipe.data, corpora=(CorpusConfig(str(path)),)))
    prepare.run(plain, run)
    (split,) = PreparedData.load(run, plain).split("train").values()
    assert split.rejected(0) is None
    assert split.rejected_lengths.tolist() == [0] * len(split)


def test_the_worse_translation_is_filtered_like_the_better_one(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    rows = [
        ("One house.", "Ein Haus.", "Ein Huhn."),
        ("One tree.", "Ein Baum.", "Guten Morgen!"),
        ("One cat.", "Eine Katze.", "Eine " + "sehr " * 10),
    ]
    train = write_jsonl(tmp_path / "train.jsonl", rows, ("src", "tgt", "worse"))
    test = write_jsonl(tmp_path / "test.jsonl", [("Good morning.", "Guten Morgen.")])
    recipe = make_recipe(
        CorpusConfig(str(train), columns=WORSE),
        CorpusConfig(str(test), split="test"),
        pairs=("en-de",),
        detect_examples=0,
        filters=FilterConfig(max_chars=40),
    )
    run = RunDirectory(recipe.run_dir)
    prepare.run(recipe, run)
    counts = json.loads((run.data / "statistics.json").read_text())["en-de"]["train"]
    assert counts["kept"] == 1
    assert counts["dropped"] == {"test_overlap_normalised": 1, "too_long": 1}


def test_a_corpus_without_the_column(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [("One house.", "Ein Haus.")])
    recipe = make_recipe(CorpusConfig(str(path), columns=WORSE), pairs=("en-de",), detect_examples=0)
    with pytest.raises(DataError, match=r"no line has 'worse' .*set data\.corpora\[0\]\.columns"):
        prepare.run(recipe, RunDirectory(recipe.run_dir))
