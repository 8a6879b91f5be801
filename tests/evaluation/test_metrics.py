"""Scores are sacreBLEU's, and the paired bootstrap tells an improvement from none."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from sacrebleu.metrics import BLEU, CHRF, TER
from sacrebleu.significance import _paired_bs_test

from lander_ds.common.errors import ConfigError
from lander_ds.config.schema.results import ScoreConfig
from lander_ds.evaluation.metrics import (
    bleu_tokenizer,
    check_tokenizers,
    evaluate,
    evaluate_sentences,
    translation_error_rate,
)

SAMPLE = Path(__file__).parents[2] / "examples" / "sample"
CONFIG = ScoreConfig(bootstrap_samples=200)


def references(language: str, count: int = 60) -> list[str]:
    lines = (SAMPLE / f"test.en-{language}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    return [json.loads(line)["tgt"] for line in lines]


def damaged(texts: list[str], share: float) -> list[str]:
    """Texts whose last words (characters where there are no spaces) are missing."""
    return [text[: max(1, round(share * len(text)))] for text in texts]


@pytest.mark.parametrize(("language", "tokenizer"), [("de", "13a"), ("zh", "zh"), ("ru", "13a")])
def test_scores_and_signatures_are_sacrebleus(language: str, tokenizer: str) -> None:
    refs = references(language)
    hyps = damaged(refs, 0.7)
    estimates, signatures = evaluate(refs, {"base": hyps}, tokenizer, CONFIG, seed=7)
    expected = {
        "bleu": BLEU(tokenize=tokenizer),
        "chrf": CHRF(),
        "chrfpp": CHRF(word_order=2),
    }
    for name, metric in expected.items():
        assert estimates["base"][name].score == pytest.approx(
            metric.corpus_score(hyps, [refs]).score, abs=1e-9
        )
        assert signatures[name].startswith("nrefs:1|bs:200|seed:7|")
        assert str(metric.get_signature()).removeprefix("nrefs:1|") in signatures[name]
    ter = TER()
    score = ter.corpus_score(hyps, [refs]).score
    assert translation_error_rate(refs, hyps, "de") == (pytest.approx(score), str(ter.get_signature()))  # type: ignore[comparison-overlap]


def test_an_improvement_is_significant_and_equality_is_not() -> None:
    refs = references("de")
    bad, good = damaged(refs, 0.4), damaged(refs, 0.8)
    estimates, _ = evaluate(refs, {"base": bad, "trained": good, "same": bad}, "13a", CONFIG, seed=1)
    for metric in ("bleu", "chrf", "chrfpp"):
        assert estimates["base"][metric].p is None
        p = estimates["trained"][metric].p
        assert p is not None
        assert p < 0.05
        assert estimates["same"][metric].p == 1.0
        assert estimates["trained"][metric].mean == pytest.approx(estimates["trained"][metric].score, rel=0.1)
        assert 0 < estimates["trained"][metric].ci < 20


def test_a_change_of_one_sentence_is_not_significant() -> None:
    refs = references("de")
    base = damaged(refs, 0.6)
    estimates, _ = evaluate(refs, {"base": base, "trained": [refs[0], *base[1:]]}, "13a", CONFIG, seed=1)
    assert estimates["trained"]["chrf"].score > estimates["base"]["chrf"].score
    assert (estimates["trained"]["chrf"].p or 0.0) > 0.05


@pytest.mark.parametrize("seed", [0, 3])
def test_the_seed_fixes_the_bootstrap_and_the_environment_is_left_alone(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SACREBLEU_SEED", "99")
    refs = references("de", 20)
    systems = {"base": damaged(refs, 0.5), "trained": damaged(refs, 0.6)}
    first = evaluate(refs, systems, "13a", CONFIG, seed)
    assert evaluate(refs, systems, "13a", CONFIG, seed) == first
    assert os.environ["SACREBLEU_SEED"] == "99"


class _SentenceScores:
    """Sentence scores as sacreBLEU's own bootstrap takes a metric: texts are numbers, and a corpus is their mean."""

    def _extract_corpus_statistics(self, hypotheses: Sequence[str], references: object) -> list[list[float]]:
        return [[float(text), 1.0] for text in hypotheses]

    def _compute_score_from_stats(self, stats: Sequence[float]) -> SimpleNamespace:
        return SimpleNamespace(score=stats[0] / stats[1])

    def _aggregate_and_compute(self, stats: Sequence[Sequence[float]]) -> SimpleNamespace:
        return self._compute_score_from_stats([sum(column) for column in zip(*stats, strict=True)])


@pytest.mark.parametrize("gain", [0.0, 0.01, 0.1])
def test_sentence_scores_are_tested_as_sacrebleu_tests(gain: float) -> None:
    generator = random.Random(2)
    base = [round(generator.random(), 3) for _ in range(40)]
    other = [round(score + gain * (number % 3), 3) for number, score in enumerate(base)]
    metric = _SentenceScores()
    texts = [[str(score) for score in scores] for scores in (base, other)]
    statistics = metric._extract_corpus_statistics(texts[0], None)
    baseline = {"m": (statistics, metric._aggregate_and_compute(statistics))}
    _, expected = _paired_bs_test(baseline, "other", texts[1], None, {"m": metric}, 200, seed=7)
    actual = evaluate_sentences({"base": base, "other": other}, CONFIG, 7)
    assert actual["base"].p is None
    assert actual["base"].score == pytest.approx(sum(base) / 40)
    estimate, result = actual["other"], expected["m"]
    # sacreBLEU's statistics are float32.
    for name in ("score", "mean", "ci"):
        assert getattr(estimate, name) == pytest.approx(getattr(result, name), rel=1e-5)
    assert estimate.p == (result.p_value if gain else 1.0)


def test_empty_hypotheses_are_scored() -> None:
    refs = references("de", 10)
    estimates, _ = evaluate(refs, {"base": [""] * 10, "trained": [*refs[:5], *[""] * 5]}, "13a", CONFIG, 1)
    assert estimates["base"]["bleu"].score == 0.0
    assert estimates["trained"]["chrf"].score > 10
    assert translation_error_rate(refs, [""] * 10, "de")[0] == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("language", "expected"),
    [
        ("de", "13a"),
        ("zh", "zh"),
        ("zh-Hant", "zh"),
        ("ZH_cn", "zh"),
        ("zho_Hans", "zh"),
        ("ja", "ja-mecab"),
        ("th", "char"),
        ("lo", "char"),
        ("km", "char"),
        ("my", "char"),
        ("xx", "13a"),
    ],
)
def test_default_tokenizers(language: str, expected: str) -> None:
    assert bleu_tokenizer(language, {}) == expected


def test_korean_needs_its_package_or_counts_characters() -> None:
    assert bleu_tokenizer("ko", {}) in {"ko-mecab", "char"}


def test_overrides() -> None:
    assert bleu_tokenizer("ja", {"ja": "char"}) == "char"
    assert bleu_tokenizer("zh-Hant", {"zh": "char"}) == "char"
    assert bleu_tokenizer("zh-Hant", {"zh": "char", "zh_hant": "intl"}) == "intl"
    check_tokenizers({"ja": "ja-mecab", "de": "intl"})


def test_an_unknown_tokenizer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"score\.tokenizers\.de: .*'moses'.*use one of 13a, char"):
        check_tokenizers({"de": "moses"})
    with pytest.raises(ConfigError, match=r"score\.tokenizers\.de"):
        bleu_tokenizer("de", {"de": "moses"})


CHINESE, JAPANESE = "我们在学校里学习中文和英文。", "彼は毎日学校で日本語を勉強する。"


@pytest.mark.parametrize(
    ("language", "text", "changed", "expected"),
    [
        ("zh", CHINESE, "大", 100 / 14),
        ("zho_Hans", CHINESE, "大", 100 / 14),
        ("yue-HK", CHINESE, "大", 100 / 14),
        # Runs of kana count as one word: 彼 は 毎 日 学 校 で 日 本 語 を 勉 強 する 。
        ("ja", JAPANESE, "大", 100 / 15),
        ("jpn_Jpan", JAPANESE, "大", 100 / 15),
        ("th", "ผมเรียนภาษาไทย", "ก", 100 / 14),
        ("lo", "ຂ້ອຍຮຽນພາສາລາວ", "ກ", 100 / 14),
        ("khm_Khmr", "ខ្ញុំរៀនភាសាខ្មែរ", "ក", 100 / 17),
        ("mya", "ကျွန်တော်မြန်မာစာ", "ခ", 100 / 17),
    ],
)
def test_ter_into_languages_without_spaces_counts_characters(
    language: str, text: str, changed: str, expected: float
) -> None:
    references, hypotheses = [text] * 20, [text[:4] + changed + text[5:]] * 20
    score, signature = translation_error_rate(references, hypotheses, language)
    assert score == pytest.approx(expected)
    assert translation_error_rate(references, references, language)[0] == 0.0
    assert "asian:yes" in signature or "tok:char" in signature


def test_ter_with_spaces_is_what_it_was() -> None:
    references = ["Ein Satz mit f\u00fcnf W\u00f6rtern."] * 3
    score, signature = translation_error_rate(references, ["Ein Satz mit vier W\u00f6rtern."] * 3, "deu_Latn")
    assert score == pytest.approx(20.0)
    assert "asian:no" in signature
    assert "tok:tercom" in signature


@pytest.mark.parametrize(
    ("language", "tokenizer", "part"),
    [
        ("zh_Latn", "13a", "tok:tercom"),
        ("nan_Latn", "13a", "tok:tercom"),
        ("nod_Thai", "char", "tok:char"),
        ("wuu_Hans", "zh", "asian:yes"),
        ("zh-TW", "zh", "asian:yes"),
        ("ko", "ko-mecab", "asian:no"),
    ],
)
def test_the_script_says_whether_words_have_spaces_between_them(
    language: str, tokenizer: str, part: str
) -> None:
    assert bleu_tokenizer(language, {}) in (tokenizer, "char")
    assert part in translation_error_rate(["a b c"], ["a b d"], language)[1]
