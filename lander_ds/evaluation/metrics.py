"""Metrics through sacreBLEU: BLEU, chrF2, chrF2++ and TER, with signatures and paired bootstrap tests; and the same tests
of sentence scores."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from sacrebleu.metrics import BLEU, CHRF, TER
from sacrebleu.significance import PairedTest, _compute_p_value, estimate_ci

from lander_ds.common.errors import ConfigError
from lander_ds.config.document import nearest
from lander_ds.config.schema.results import ScoreConfig
from lander_ds.data.tokens.languages import normalise_code, standard_code
from lander_ds.evaluation.scripts import script_of

logger = logging.getLogger(__name__)

BOOTSTRAPPED = ("bleu", "chrf", "chrfpp")
"""Metrics with confidence intervals and p-values. `chrf` is chrF2, `chrfpp` chrF2++ (word order 2)."""

_DEFAULT_SEED = 12345
"""sacreBLEU's own, for seed 0, which it takes for "no seed"."""

_CHINESE = ("zh", "cmn", "yue", "wuu", "nan", "hak", "gan", "hsn", "lzh")
# Written without spaces between words, and no segmenter is installed: characters are the words.
_WITHOUT_SPACES_IN = ("thai", "laoo", "khmr", "mymr", "tibt")
_WITHOUT_SPACES = ("th", "lo", "km", "my", "bo", "dz", "shn")


@dataclass(frozen=True)
class Estimate:
    """A corpus score and what the bootstrap says of it."""

    score: float
    """Points, 0 to 100; of a neural metric on its own scale."""
    mean: float
    """Mean over bootstrap samples."""
    ci: float
    """Half the width of the 95 % confidence interval."""
    p: float | None
    """p-value of the difference to the baseline; None for the baseline itself."""


def bleu_tokenizer(language: str, overrides: Mapping[str, str]) -> str:
    """The sacreBLEU tokenizer for a target language.

    Chinese `zh`, Japanese `ja-mecab`, Korean `ko-mecab` (`char` where its package is not installed), other
    languages written without spaces `char`, all others `13a`.

    Args:
        language: code as in the recipe; region and script are ignored where nothing is known about them.
        overrides: `score.tokenizers` of the recipe.

    Raises:
        ConfigError: an override names a tokenizer that sacreBLEU does not have, or that is not installed.
    """
    code = normalise_code(language)
    bare = standard_code(language).partition("-")[0]
    own = {normalise_code(name): tokenizer for name, tokenizer in overrides.items()}
    for candidate in (code, code.partition("-")[0], bare):
        if candidate in own:
            return _checked_tokenizer(own[candidate], candidate)
    match _writing(language):
        case "korean":
            return _korean_tokenizer()
        case "characters":
            return "char"
        case "chinese":
            return "zh"
        case "japanese":
            return "ja-mecab"
    return "13a"


def _writing(language: str) -> Literal["chinese", "japanese", "korean", "characters", "spaces"]:
    """Between what words stand in a language; the script counts more (`zh_Latn` has spaces, `nod_Thai` has none)."""
    bare, script = standard_code(language).partition("-")[0], script_of(language)
    if script == "latn":
        return "spaces"
    if bare == "ko":
        return "korean"
    if bare == "ja":
        return "japanese"
    if bare in _CHINESE or script in ("hans", "hant", "hani"):
        return "chinese"
    return "characters" if bare in _WITHOUT_SPACES or script in _WITHOUT_SPACES_IN else "spaces"


def check_tokenizers(overrides: Mapping[str, str]) -> None:
    """Refuse tokenizers that cannot be used.

    Raises:
        ConfigError: see `bleu_tokenizer`.
    """
    for language, tokenizer in overrides.items():
        _checked_tokenizer(tokenizer, language)


def evaluate(
    references: Sequence[str],
    hypotheses: Mapping[str, Sequence[str]],
    tokenizer: str,
    config: ScoreConfig,
    seed: int,
) -> tuple[dict[str, dict[str, Estimate]], dict[str, str]]:
    """BLEU, chrF2 and chrF2++ of systems, each tested against the first by paired bootstrap (R, Koehn 2004).

    Args:
        references: N texts.
        hypotheses: system -> N texts; the first system is the baseline.
        tokenizer: for BLEU.
        config: number of bootstrap samples.
        seed: of the bootstrap.

    Returns:
        system -> metric -> estimate, and metric -> sacreBLEU signature.
    """
    metrics = {
        "bleu": BLEU(tokenize=tokenizer, references=[references]),
        "chrf": CHRF(references=[references]),
        "chrfpp": CHRF(word_order=2, references=[references]),
    }
    with _bootstrap_seed(seed):
        test = PairedTest(list(hypotheses.items()), metrics, None, "bs", n_samples=config.bootstrap_samples)
        signatures, results = test()
    estimates: dict[str, dict[str, Estimate]] = {system: {} for system in hypotheses}
    for metric, label in zip(metrics, signatures, strict=True):
        baseline = results[label][0]
        for system, result in zip(hypotheses, results[label], strict=True):
            p = result.p_value
            # sacreBLEU counts strictly larger differences only and so calls equal systems different.
            if p is not None and result.score == baseline.score:
                p = 1.0
            estimates[system][metric] = Estimate(result.score, float(result.mean), float(result.ci), p)
    return estimates, {
        metric: str(signatures[label]) for metric, label in zip(metrics, signatures, strict=True)
    }


def evaluate_sentences(
    scores: Mapping[str, Sequence[float]], config: ScoreConfig, seed: int
) -> dict[str, Estimate]:
    """Means of sentence scores of systems, each tested against the first as in `evaluate`, on the same resamples.

    Args:
        scores: system -> N sentence scores; the first system is the baseline.
        config: number of bootstrap samples.
        seed: of the bootstrap.
    """
    table = np.array(list(scores.values()), dtype=np.float64)  # [systems, N]
    count = table.shape[1]
    generator = np.random.default_rng(seed or _DEFAULT_SEED)
    drawn = generator.choice(count, size=(config.bootstrap_samples, count), replace=True)
    estimates: dict[str, Estimate] = {}
    for system, sentences in zip(scores, table, strict=True):
        samples, difference = sentences[drawn].mean(axis=1), abs(sentences.mean() - table[0].mean())
        mean, ci = estimate_ci(samples)
        p = None
        if estimates:
            apart = np.abs(samples - table[0][drawn].mean(axis=1))
            # As in `evaluate`: equal systems are not different.
            p = _compute_p_value(apart - apart.mean(), difference) if difference else 1.0
        estimates[system] = Estimate(float(sentences.mean()), float(mean), float(ci), p)
    return estimates


def translation_error_rate(
    references: Sequence[str], hypotheses: Sequence[str], language: str
) -> tuple[float, str]:
    """Corpus TER in percent (lower is better) and its sacreBLEU signature.

    Into Chinese and Japanese with sacreBLEU's support for Asian languages, which needs its normalisation; into other
    languages written without spaces over characters, which the signature calls `tok:char`. Otherwise a sentence would
    be one word.

    Args:
        references: N texts.
        hypotheses: N texts.
        language: target language, as in the recipe.
    """
    writing = _writing(language)
    asian, characters = writing in ("chinese", "japanese"), writing == "characters"
    metric = TER(normalized=asian, asian_support=asian)
    if characters:
        references, hypotheses = (
            [" ".join("".join(t.split())) for t in texts] for texts in (references, hypotheses)
        )
    score = metric.corpus_score(list(hypotheses), [list(references)])
    signature = str(metric.get_signature())
    return float(score.score), signature.replace("tok:tercom", "tok:char") if characters else signature


def _checked_tokenizer(tokenizer: str, language: str) -> str:
    where = f"score.tokenizers.{language}"
    if tokenizer not in BLEU.TOKENIZERS:
        near = nearest(tokenizer, BLEU.TOKENIZERS)
        hint = f"did you mean {near}?" if near else f"use one of {', '.join(sorted(BLEU.TOKENIZERS))}"
        raise ConfigError(f"{where}: sacreBLEU has no tokenizer {tokenizer!r}; {hint}")
    if problem := _problem_with(tokenizer):
        raise ConfigError(
            f"{where}: {tokenizer} cannot be used here ({problem}): install what it needs, or use char"
        )
    return tokenizer


@cache
def _korean_tokenizer() -> str:
    if _problem_with("ko-mecab") is None:
        return "ko-mecab"
    logger.warning("BLEU into Korean counts characters: for words pip install 'sacrebleu[ko]'")
    return "char"


@cache
def _problem_with(tokenizer: str) -> str | None:
    try:
        BLEU(tokenize=tokenizer)
    except (
        Exception,
        SystemExit,
    ) as error:  # a missing package, or a sentencepiece model that cannot be fetched
        return " ".join(str(error).split()) or type(error).__name__
    return None


@contextmanager
def _bootstrap_seed(seed: int) -> Iterator[None]:
    # sacreBLEU reads its seed from the environment only.
    before: Any = os.environ.get("SACREBLEU_SEED")
    os.environ["SACREBLEU_SEED"] = str(seed or _DEFAULT_SEED)
    try:
        yield
    finally:
        if before is None:
            del os.environ["SACREBLEU_SEED"]
        else:
            os.environ["SACREBLEU_SEED"] = before
