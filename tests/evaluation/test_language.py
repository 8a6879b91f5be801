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


SERBIAN = {
    "Cyrl": "Сва људска бића рађају се слободна и једнака у достојанству и правима.",
    "Latn": "Sva ljudska bića rađaju se slobodna i jednaka u dostojanstvu i pravima.",
}
CHINESE = {
    "Hans": "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心。",
    "Hant": "人人生而自由，在尊嚴和權利上一律平等。他們賦有理性和良心。",
}


@pytest.mark.parametrize(
    ("target", "text", "off"),
    [
        ("sr_Cyrl", SERBIAN["Cyrl"], 0.0),
        ("srp_Cyrl", SERBIAN["Cyrl"], 0.0),
        ("sr_Latn", SERBIAN["Cyrl"], 1.0),
        ("sr", SERBIAN["Cyrl"], 0.0),
        ("zh_Hans", CHINESE["Hans"], 0.0),
        ("zh_Hans", CHINESE["Hant"], 1.0),
        ("zho_Hant", CHINESE["Hant"], 0.0),
        ("zho_Hant", CHINESE["Hans"], 1.0),
        ("zh-TW", CHINESE["Hans"], 1.0),
        ("zh-CN", CHINESE["Hans"], 0.0),
        ("zh", CHINESE["Hans"], 0.0),
        ("zh", CHINESE["Hant"], 0.0),
        # The same characters in both.
        ("zh_Hans", "人人生而自由", 0.0),
        ("zh_Hant", "人人生而自由", 0.0),
    ],
)
def test_scripts_are_told_apart(target: str, text: str, off: float) -> None:
    assert LanguageIdentifier({"en", target}).off_target([text], target) == off
