"""Off-target translations are noticed in the languages of the sample corpora."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lander_ds.evaluation.language import LanguageIdentifier, identifier_code

SAMPLE = Path(__file__).parents[2] / "examples" / "sample"


@pytest.fixture(scope="module")
def identifier() -> LanguageIdentifier:
    """Knows the demo's languages."""
    return LanguageIdentifier({"en", "de", "fr", "ru", "cs"})


@pytest.mark.parametrize("language", ["de", "fr", "ru", "cs"])
def test_references_are_on_target_and_sources_are_not(identifier: LanguageIdentifier, language: str) -> None:
    lines = (SAMPLE / f"test.en-{language}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    translated = identifier.off_target([row["tgt"] for row in rows], language)
    copied = identifier.off_target([row["src"] for row in rows], language)
    assert translated is not None
    assert translated <= 0.05
    assert copied is not None
    assert copied >= 0.9


def test_texts_without_letters_do_not_count(identifier: LanguageIdentifier) -> None:
    german = "Klicken Sie auf die Schaltfläche, um fortzufahren."
    assert identifier.off_target([german, "", "123 %", german], "de") == 0.0
    assert identifier.off_target(["", "42"], "de") is None


def test_unknown_language(identifier: LanguageIdentifier) -> None:
    assert identifier.off_target(["tlhIngan maH"], "tlh") is None
    assert LanguageIdentifier({"en", "tlh"}).off_target(["This is an English sentence."], "en") == 0.0


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("de", "de"),
        ("pt-BR", "pt"),
        ("zh_Hant", "zh"),
        ("deu_Latn", "de"),
        ("nb", "no"),
        ("nn", "nn"),
        ("zz", None),
    ],
)
def test_codes(code: str, expected: str | None) -> None:
    assert identifier_code(code) == expected
