"""The published results follow from the published translations, and the page from the results."""

from __future__ import annotations

from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import evidence
import pytest
from sacrebleu.metrics import BLEU, CHRF

from lander_ds.common.files import read_json
from lander_ds.data.tokens.languages import split_pair
from lander_ds.evaluation.metrics import bleu_tokenizer
from lander_ds.experiment.grid import load_experiment
from lander_ds.experiment.outcome import Figures, hypotheses, published, references
from lander_ds.experiment.results import RESULTS_FILE, assemble

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"
COMPARED = [
    pytest.param(out, figures, id=f"{out.name}-{figures['kind']}-{figures['method']}-{figures['seed']}")
    for out in sorted(RESULTS.iterdir())
    if (out / "cells").is_dir()
    for figures in published(out)
    if figures["kind"] != "trial"
]


@pytest.mark.parametrize(("out", "figures"), COMPARED)
def test_scores_follow_from_the_translations(out: Path, figures: Figures) -> None:
    sources = references(out, figures["variant"])
    for system, texts in hypotheses(out, figures).items():
        by_pair: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for key, text in texts.items():
            by_pair[key[0]].append((text, sources[key]["ref"]))
        for pair, lines in by_pair.items():
            name, _, direction = pair.rpartition(":")
            where = figures["sets"][name]["systems"] if name else figures["systems"]
            hyps, refs = zip(*lines, strict=True)
            tokenizer = bleu_tokenizer(split_pair(direction)[1], {})
            for measure, metric in metrics(refs, tokenizer).items():
                score = metric.corpus_score(list(hyps), None).score
                assert score == pytest.approx(where[system][direction][measure]), measure


@cache
def metrics(references: tuple[str, ...], tokenizer: str) -> dict[str, Any]:
    """By the key of their score; all translations of a test set share the n-grams of its references."""
    refs = [list(references)]
    return {
        "chrf": CHRF(references=refs),
        "chrfpp": CHRF(word_order=2, references=refs),
        "bleu": BLEU(tokenize=tokenizer, references=refs),
    }


@pytest.mark.parametrize(
    "name", [name for name in evidence.EXPERIMENTS if (RESULTS / name / RESULTS_FILE).exists()]
)
def test_comparisons_follow_from_the_translations(name: str) -> None:
    experiment = load_experiment(ROOT / "experiments" / f"{name}.yaml")
    assert assemble(experiment, name, RESULTS / name) == read_json(RESULTS / name / RESULTS_FILE, "")


def test_the_page_follows_from_the_results() -> None:
    assert (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8") == evidence.render()
