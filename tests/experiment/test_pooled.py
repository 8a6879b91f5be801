"""Comparing methods over directions and seeds."""

from __future__ import annotations

import random

import pytest

from lander_ds.config.schema.results import ScoreConfig
from lander_ds.evaluation.metrics import evaluate
from lander_ds.evaluation.pooled import compare

SENTENCE = "the cat sat on a mat while rain fell over old towns and people read books by dim light"
WORDS = SENTENCE.split()


def texts(seed: int, count: int = 60) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=8)) for _ in range(count)]


def spoiled(sentences: list[str], share: float, seed: int) -> list[str]:
    generator = random.Random(seed)
    return [
        " ".join("xyzzy" if generator.random() < share else word for word in sentence.split())
        for sentence in sentences
    ]


REFERENCES = {"en-de": texts(1), "en-fr": texts(2)}


def side(share: float, seeds: tuple[int, ...]) -> dict[str, list[list[str]]]:
    return {pair: [spoiled(refs, share, seed) for seed in seeds] for pair, refs in REFERENCES.items()}


def test_the_difference_is_that_of_sacrebleu_scores() -> None:
    a, b = side(0.1, (1, 2)), side(0.4, (3, 4))
    difference = compare(REFERENCES, a, b, samples=50)
    expected = []
    for pair, refs in REFERENCES.items():
        scores = [
            evaluate(refs, {"one": one}, "13a", ScoreConfig(bootstrap_samples=2), 1)[0]["one"]["chrf"].score
            for one in (*a[pair], *b[pair])
        ]
        expected.append((scores[0] + scores[1] - scores[2] - scores[3]) / 2)
    assert list(difference.per_pair.values()) == pytest.approx(expected)
    assert difference.mean == pytest.approx(sum(expected) / 2)


def test_a_clear_difference_is_significant_and_none_is_not() -> None:
    clear = compare(REFERENCES, side(0.1, (1,)), side(0.4, (2,)), samples=200)
    assert clear.p < 0.01
    assert clear.low > 0
    same = compare(REFERENCES, side(0.2, (1,)), side(0.2, (1,)), samples=200)
    assert (same.mean, same.p) == (0, 1)
    alike = compare(REFERENCES, side(0.2, (1,)), side(0.2, (2,)), samples=200)
    assert alike.p > 0.05
    assert alike.low < 0 < alike.high


def test_more_seeds_of_the_same_translations_are_no_more_evidence() -> None:
    once = compare(REFERENCES, side(0.2, (1,)), side(0.23, (2,)), samples=300)
    often = compare(REFERENCES, side(0.2, (1, 1, 1)), side(0.23, (2, 2, 2)), samples=300)
    assert often.p == once.p
