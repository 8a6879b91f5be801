"""Entries of scores.json: any subset of systems, and translations that do not fit together."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sacrebleu.metrics import BLEU

from lander_ds.common.errors import ArtefactError
from lander_ds.config.schema.results import ScoreConfig
from lander_ds.evaluation.documents import joined
from lander_ds.evaluation.language import LanguageIdentifier
from lander_ds.evaluation.score import documents_of, means, score_pair
from lander_ds.inference.translations import Translation
from lander_ds.report.summary import pair_scores, remarks, score_tables

CONFIG = ScoreConfig(bootstrap_samples=50)
REFERENCES = [
    f"Dies ist der Satz mit der Nummer {number}, und er handelt von den Einstellungen."
    for number in range(20)
]


def system(share: float) -> list[Translation]:
    """Translations that get the first `share` of the words right, every other one a word less."""
    built = []
    for number, reference in enumerate(REFERENCES):
        words = reference.split()
        hypothesis = " ".join(words[: round(share * len(words)) - number % 2 * (share > 0)])
        built.append(Translation(f"en-de:test:{number}", f"source {number}", reference, hypothesis, 5))
    return built


@pytest.fixture(scope="module")
def identifier() -> LanguageIdentifier:
    """English and German."""
    return LanguageIdentifier({"en", "de"})


def test_all_systems(identifier: LanguageIdentifier) -> None:
    # The baseline comes first whatever the order of the systems.
    systems = {"trained": system(0.9), "fewshot": system(0.6), "base": system(0.3)}
    entry, signatures = score_pair("en-de", systems, CONFIG, 1, identifier)
    assert entry["sentences"] == 20
    assert entry["tokenizer"] == "13a"
    for metric in ("bleu", "chrf", "chrfpp"):
        scores = [entry["systems"][name][metric] for name in ("base", "fewshot", "trained")]
        assert scores == sorted(scores)
        assert scores[0] < scores[2]
        assert entry[f"p_{metric}"] == entry["systems"]["trained"][f"p_{metric}"] < 0.05
        assert entry[f"p_{metric}_vs_fewshot"] < 0.05
        assert f"p_{metric}" not in entry["systems"]["base"]
        assert entry["systems"]["base"][f"{metric}_ci"] > 0
    assert set(signatures) == {"bleu", "chrf", "chrfpp", "ter"}
    assert "tok:13a" in signatures["bleu"]
    assert "nw:2" in signatures["chrfpp"]
    assert entry["off_target_reference"] == 0.0


@pytest.mark.parametrize("names", [("trained",), ("base",), ("fewshot", "trained")])
def test_without_baseline_or_trained_system_there_is_no_p(
    names: tuple[str, ...], identifier: LanguageIdentifier
) -> None:
    entry, _ = score_pair("en-de", {name: system(0.5) for name in names}, CONFIG, 1, identifier)
    assert set(entry["systems"]) == set(names)
    assert entry["p_bleu"] is entry["p_chrf"] is entry["p_chrfpp"] is None
    assert all("p_chrf" not in figures for figures in entry["systems"].values())
    assert (entry["p_chrf_vs_fewshot"] is None) == (len(names) == 1)


def test_ter_can_be_left_out(identifier: LanguageIdentifier) -> None:
    config = ScoreConfig(bootstrap_samples=50, ter=False)
    entry, signatures = score_pair("en-de", {"base": system(0.5)}, config, 1, identifier)
    assert "ter" not in signatures
    assert "ter" not in entry["systems"]["base"]
    assert means({"en-de": entry})["base"]["ter"] is None


def test_empty_translations_are_counted(identifier: LanguageIdentifier) -> None:
    entry, _ = score_pair("en-de", {"base": system(0.0)}, CONFIG, 1, identifier)
    assert entry["systems"]["base"]["empty"] == 1.0
    assert entry["systems"]["base"]["off_target"] is None
    assert entry["systems"]["base"]["chrf"] == 0.0


def test_unknown_target_language(identifier: LanguageIdentifier) -> None:
    entry, _ = score_pair("en-tlh", {"base": system(0.5)}, CONFIG, 1, identifier)
    assert entry["systems"]["base"]["off_target"] is None
    assert entry["off_target_reference"] is None


def test_the_order_of_the_sentences_does_not_matter(identifier: LanguageIdentifier) -> None:
    straight, _ = score_pair("en-de", {"base": system(0.3), "trained": system(0.9)}, CONFIG, 1, identifier)
    turned = {"base": system(0.3), "trained": system(0.9)[::-1]}
    assert score_pair("en-de", turned, CONFIG, 1, identifier)[0] == straight


def test_systems_that_do_not_fit_together(identifier: LanguageIdentifier) -> None:
    base = system(0.3)
    with pytest.raises(
        ArtefactError, match=r"en-de: base translated 20 sentences and trained 19; 1 .*'en-de:test:19'"
    ):
        score_pair("en-de", {"base": base, "trained": system(0.9)[:-1]}, CONFIG, 1, identifier)
    other = [*system(0.9)[:-1], replace(system(0.9)[-1], id="en-de:test:x")]
    with pytest.raises(ArtefactError, match="2 sentence ids stand in one of them only"):
        score_pair("en-de", {"base": base, "trained": other}, CONFIG, 1, identifier)
    changed = [*system(0.9)[:-1], replace(system(0.9)[-1], ref="Anders.")]
    with pytest.raises(ArtefactError, match="'en-de:test:19' has different references in base and trained"):
        score_pair("en-de", {"base": base, "trained": changed}, CONFIG, 1, identifier)
    with pytest.raises(ArtefactError, match="base has translated no sentence"):
        score_pair("en-de", {"base": []}, CONFIG, 1, identifier)


def test_means_over_pairs(identifier: LanguageIdentifier) -> None:
    low, _ = score_pair("en-de", {"base": system(0.3)}, CONFIG, 1, identifier)
    high, _ = score_pair("en-de", {"base": system(0.9)}, CONFIG, 1, identifier)
    mean = means({"en-de": low, "en-fr": high})["base"]
    assert mean["chrf"] == pytest.approx(
        (low["systems"]["base"]["chrf"] + high["systems"]["base"]["chrf"]) / 2
    )


def test_translations_cut_short_are_counted_and_told(identifier: LanguageIdentifier) -> None:
    cut = [replace(one, truncated=number < 5) for number, one in enumerate(system(0.9))]
    entry, _ = score_pair("en-de", {"base": system(0.3), "trained": cut}, CONFIG, 1, identifier)
    assert entry["systems"]["trained"]["truncated"] == 0.25
    assert entry["systems"]["base"]["truncated"] is None
    figures = pair_scores({"pairs": {"en-de": entry}})
    assert (figures["en-de"]["truncated"], figures["en-de"]["base_truncated"]) == (0.25, None)
    assert remarks(figures) == [
        "en-de, trained: 25.0 % of the translations were cut short at translate.max_new_tokens"
    ]


def test_whole_documents(identifier: LanguageIdentifier) -> None:
    """Sentences of a document are one text, and a sentence of none is a text of its own."""
    documents = ["a"] * 4 + ["b"] * 4 + [None] * 2 + ["a"] * 10

    def known(share: float) -> list[Translation]:
        return [replace(one, doc=doc) for one, doc in zip(system(share), documents, strict=True)]

    systems = {"trained": known(0.9), "base": system(0.5)}
    assert documents_of(systems) == [4, 4, 1, 1, 10]
    assert documents_of({"base": system(0.5)}) is None
    assert joined(["a", "b", "c"], [2, 1]) == ["a b", "c"]
    entry, signatures = score_pair("en-de", systems, CONFIG, 1, identifier)
    assert entry["documents"] == 5
    trained = entry["systems"]["trained"]
    expected = BLEU().corpus_score(
        joined([one.hyp for one in systems["trained"]], [4, 4, 1, 1, 10]),
        [joined(REFERENCES, [4, 4, 1, 1, 10])],
    )
    assert trained["doc_bleu"] == pytest.approx(expected.score)
    assert trained["doc_bleu"] != trained["bleu"]
    assert entry["p_doc_chrf"] == trained["p_doc_chrf"]
    assert {"doc_bleu", "doc_chrf"} <= set(signatures)
    pairs = {"en-de": entry}
    assert means(pairs)["trained"]["doc_chrf"] == trained["doc_chrf"]
    figures = pair_scores({"pairs": pairs})["en-de"]
    assert figures["doc_chrf"] == trained["doc_chrf"]
    _, of_documents = score_tables({"en-de": figures}, [])
    assert str(of_documents.title).startswith("BLEU / chrF2 of whole documents")
    unknown, _ = score_pair("en-de", {"trained": system(0.9)}, CONFIG, 1, identifier)
    assert "documents" not in unknown
    assert len(score_tables(pair_scores({"pairs": {"en-de": unknown}}), [])) == 1
