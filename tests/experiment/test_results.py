"""The first variant of an experiment against the others: translations given, differences expected."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest

from lander_ds.experiment.grid import Experiment, load_experiment
from lander_ds.experiment.results import Texts, across_variants
from lander_ds.experiment.table import as_markdown

TEXT = """\
recipe: recipe.yaml
run_dir: runs
baseline: lora
variants: {joint: {}, de: {data.pairs: [en-de]}, fr: {data.pairs: [en-fr]}}
methods:
  base: {trained: false}
  lora: {set: {train.method: lora}}
  landermt: {}
"""
REFERENCES = {
    ("en-de", "1"): "Das Wetter ist heute schön.",
    ("en-de", "2"): "Morgen regnet es überall.",
    ("en-fr", "1"): "Il fait beau aujourd'hui.",
    ("kept:en-es", "1"): "Hace buen tiempo hoy.",
}
WORSE = "Das ist etwas anderes."


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    """Whose first variant has both directions, and the others one each."""
    file = tmp_path / "joint.yaml"
    file.write_text(TEXT, encoding="utf-8")
    for variant, pairs in {"joint": ("en-de", "en-fr"), "de": ("en-de",), "fr": ("en-fr",)}.items():
        rows = [
            json.dumps({"pair": pair, "id": name, "src": "", "ref": ref})
            for (pair, name), ref in REFERENCES.items()
            if pair in pairs or ":" in pair
        ]
        (tmp_path / f"references.{variant}.jsonl.xz").write_bytes(lzma.compress("\n".join(rows).encode()))
    return load_experiment(file)


def right(*pairs: str) -> dict[tuple[str, str], str]:
    return {key: ref for key, ref in REFERENCES.items() if key[0] in pairs}


def test_the_first_variant_is_compared_with_each_other_where_both_have_translated(
    experiment: Experiment, tmp_path: Path
) -> None:
    """Named test sets are left out, and so is the untouched base, which is the same in all variants."""
    worse = dict.fromkeys(right("en-de", "kept:en-es"), WORSE)
    texts: Texts = {
        ("steps", "joint", "lora"): [right("en-de", "en-fr", "kept:en-es")],
        ("steps", "de", "lora"): [worse, worse],
        ("steps", "fr", "lora"): [right("en-fr")],
        ("steps", "fr", "landermt"): [right("en-fr")],
        ("steps", "joint", "base"): [right("en-de")],
        ("steps", "de", "base"): [right("en-de")],
    }
    alone, same = across_variants(experiment, texts, tmp_path)
    assert (alone["method"], alone["a"], alone["b"], alone["seeds"]) == ("lora", "joint", "de", [1, 2])
    assert alone["per_pair"].keys() == {"en-de"}
    assert alone["mean_chrf_diff"] == alone["per_pair"]["en-de"] > 50
    assert (same["b"], same["mean_chrf_diff"], same["p"]) == ("fr", 0.0, 1.0)


def test_sentences_that_only_bear_the_same_name_are_not_compared(
    experiment: Experiment, tmp_path: Path
) -> None:
    """A variant with test corpora of its own: two sentences, the first of which the other has under the same name too."""
    rows = [
        {"pair": "en-de", "id": "1", "src": "", "ref": REFERENCES["en-de", "1"]},
        {"pair": "en-de", "id": "2", "src": "", "ref": "Ein anderer Satz."},
    ]
    text = "\n".join(map(json.dumps, rows))
    (tmp_path / "references.de.jsonl.xz").write_bytes(lzma.compress(text.encode()))
    texts: Texts = {
        ("steps", "joint", "lora"): [right("en-de")],
        ("steps", "de", "lora"): [{("en-de", "1"): REFERENCES["en-de", "1"], ("en-de", "2"): WORSE}],
    }
    (row,) = across_variants(experiment, texts, tmp_path)
    assert (row["mean_chrf_diff"], row["p"]) == (0.0, 1.0)


def test_the_table_has_a_column_per_other_variant() -> None:
    row = {"at": "steps", "a": "joint", "interval": [0.1, 2.9], "seeds": [1, 1], "per_pair": {}}
    results = {
        "baseline": "lora",
        "cells": [],
        "signatures": {},
        "comparisons": [],
        "variants": [
            {**row, "method": "lora", "b": "de", "mean_chrf_diff": 1.5, "p": 0.002},
            {**row, "method": "full", "b": "fr", "mean_chrf_diff": -0.25, "p": 0.4},
        ],
    }
    assert as_markdown(results).startswith(
        "### At equal steps: joint against the other variants\n\n"
        "| method | de | fr |\n| --- | --: | --: |\n| lora | +1.50 (p 0.002) |  |\n| full |  | -0.25 (p 0.400) |\n"
    )
