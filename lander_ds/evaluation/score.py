"""From translations to scores: the contents of `scores.json`.

Per pair and system: BLEU, chrF2 (`chrf`), chrF2++ (`chrfpp`) and TER, bootstrap mean and half-width of the
95 % interval (`*_mean`, `*_ci`), the p-value of the difference to the baseline (`p_*`), the share of
translations in another language than the target (`off_target`), the share of empty ones (`empty`)
and that of those cut short at `translate.max_new_tokens` (`truncated`). A neural metric (`score.neural`) has the figures of
BLEU, under its name.
Where the corpus says which document a sentence is of, `doc_bleu` and `doc_chrf` are BLEU and chrF2 of whole documents, with
the same figures; the bootstrap draws documents.
The baseline is the system `baseline`, read from the file of `score.baseline`, or else the untouched base.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from lander_ds.common.errors import ArtefactError
from lander_ds.config.schema.results import ScoreConfig
from lander_ds.data.tokens.languages import split_pair
from lander_ds.evaluation.documents import DOCUMENTS, document_lengths, documented, joined
from lander_ds.evaluation.language import LanguageIdentifier
from lander_ds.evaluation.metrics import (
    BOOTSTRAPPED,
    Estimate,
    bleu_tokenizer,
    evaluate,
    evaluate_sentences,
    translation_error_rate,
)
from lander_ds.evaluation.neural_scores import NeuralScores, Segment
from lander_ds.inference.translations import Translation

GIVEN = "baseline"
"""The system whose translations come from the file of `score.baseline`."""
BASE = "base"
TRAINED = "trained"
FEWSHOT = "fewshot"
TRAINED_FEWSHOT = "trained_fewshot"
MEANS = (*BOOTSTRAPPED, "ter", "off_target", "empty", "truncated")

Translations = Mapping[str, Sequence[Translation]]
"""System -> its translations of one pair."""
Segments = Mapping[str, Sequence[Segment]]
"""The same as what metrics read, every system's in the same order."""


def baseline_of(systems: Collection[str]) -> str | None:
    """The system that the others are tested against; None when neither a file nor the base is among them."""
    return next((name for name in (GIVEN, BASE) if name in systems), None)


def score_pair(
    pair: str,
    translations: Translations,
    config: ScoreConfig,
    seed: int,
    identifier: LanguageIdentifier,
    neural: Mapping[str, NeuralScores] | None = None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Score every system on one pair.

    Args:
        pair: translation direction.
        translations: at least one system.
        config: metrics and bootstrap.
        seed: of the bootstrap.
        identifier: for the off-target rate.
        neural: by metric, the scores of every segment.

    Returns:
        The pair's entry in `scores.json`, and metric -> signature.

    Raises:
        ArtefactError: there is no sentence, or systems translated other sentences or have other references.
        ConfigError: the recipe's tokenizer for the target language cannot be used.
    """
    language = split_pair(pair)[1]
    tokenizer = bleu_tokenizer(language, config.tokenizers)
    segments = aligned(pair, translations)
    references = [segment.ref for segment in next(iter(segments.values()))]
    documents = documents_of(translations)

    def estimate(compared: Segments) -> tuple[dict[str, dict[str, Estimate]], dict[str, str]]:
        """Of systems, each tested against the first."""
        hypotheses = {system: [segment.mt for segment in of] for system, of in compared.items()}
        estimates, signatures = evaluate(references, hypotheses, tokenizer, config, seed)
        for metric, scores in (neural or {}).items():
            sentences = {system: [scores.of[segment] for segment in of] for system, of in compared.items()}
            for system, estimated in evaluate_sentences(sentences, config, seed).items():
                estimates[system][metric] = estimated
            signatures[metric] = scores.signature
        if documents is not None:
            whole = {system: joined(texts, documents) for system, texts in hypotheses.items()}
            of_whole, signed = evaluate(joined(references, documents), whole, tokenizer, config, seed)
            for name, metric in DOCUMENTS.items():
                signatures[name] = signed[metric]
                for system, estimated_whole in of_whole.items():
                    estimates[system][name] = estimated_whole[metric]
        return estimates, signatures

    estimates, signatures = estimate(segments)
    baseline = baseline_of(segments)
    systems: dict[str, dict[str, Any]] = {}
    for system, of_system in segments.items():
        figures = _figures(estimates[system], compared=baseline not in (None, system))
        texts = [segment.mt for segment in of_system]
        if config.ter:
            figures["ter"], signatures["ter"] = translation_error_rate(references, texts, language)
        figures["off_target"] = identifier.off_target(texts, language)
        figures["empty"] = sum(not text for text in texts) / len(texts)
        figures["truncated"] = _share([one.truncated for one in translations[system]])
        systems[system] = figures
    # The base with examples in its prompt is the fairer comparison.
    compared = {system: segments[system] for system in (FEWSHOT, TRAINED) if system in segments}
    fairer = estimate(compared)[0][TRAINED] if len(compared) == 2 else {}
    tested = (*BOOTSTRAPPED, *(neural or {}), *(DOCUMENTS if documents else ()))
    entry = {
        "sentences": len(references),
        **({"documents": len(documents)} if documents else {}),
        "tokenizer": tokenizer,
        "systems": systems,
        **{f"p_{metric}": systems.get(TRAINED, {}).get(f"p_{metric}") for metric in tested},
        **{f"p_{metric}_vs_fewshot": fairer[metric].p if fairer else None for metric in tested},
        "off_target_reference": identifier.off_target(references, language),
    }
    return entry, signatures


def documents_of(translations: Translations) -> list[int] | None:
    """How many sentences each document has, in the order of `aligned`; None where no sentence is known to be of one."""
    known = {one.id: one.doc for of in translations.values() for one in of if one.doc is not None}
    if not known:
        return None
    baseline = baseline_of(translations)
    order = translations[next(iter(translations)) if baseline is None else baseline]
    return document_lengths([known.get(one.id) for one in order])


def aligned(pair: str, translations: Translations) -> dict[str, list[Segment]]:
    """Every system's segments in the same order, the baseline first.

    Raises:
        ArtefactError: see `score_pair`.
    """
    baseline = baseline_of(translations)
    ordered = sorted(translations, key=lambda system: system != baseline)
    first, reference = ordered[0], translations[ordered[0]]
    cure = "run stage translate (again) for both"
    if not reference:
        raise ArtefactError(f"{pair}: {first} has translated no sentence: is there test data for this pair?")
    segments = {}
    for system in ordered:
        by_id = {translation.id: translation for translation in translations[system]}
        if different := sorted({translation.id for translation in reference}.symmetric_difference(by_id)):
            raise ArtefactError(
                f"{pair}: {first} translated {len(reference)} sentences and {system} {len(by_id)}; "
                f"{len(different)} sentence ids stand in one of them only, e.g. {different[0]!r}: {cure}"
            )
        for translation in reference:
            if translation.ref != by_id[translation.id].ref:
                raise ArtefactError(
                    f"{pair}: sentence {translation.id!r} has different references in {first} and {system}: "
                    f"{cure}"
                )
        segments[system] = [Segment(one.src, by_id[one.id].hyp, one.ref) for one in reference]
    return segments


def means(
    pairs: Mapping[str, Mapping[str, Any]], neural: Iterable[str] = ()
) -> dict[str, dict[str, float | None]]:
    """System -> metric -> mean over pairs; None where a pair lacks the figure. `neural`: names of neural metrics."""
    systems = next(iter(pairs.values()))["systems"]
    documents = documented(of for entry in pairs.values() for of in entry["systems"].values())
    return {
        system: {
            metric: _mean([pair["systems"][system].get(metric) for pair in pairs.values()])
            for metric in (*MEANS, *neural, *documents)
        }
        for system in systems
    }


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return fmean(present) if len(present) == len(values) else None


def _share(values: Sequence[bool | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(values) if len(known) == len(values) else None


def _figures(estimates: Mapping[str, Estimate], compared: bool) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for metric, estimate in estimates.items():
        figures |= {metric: estimate.score, f"{metric}_mean": estimate.mean, f"{metric}_ci": estimate.ci}
        if compared:
            figures[f"p_{metric}"] = estimate.p
    return figures
