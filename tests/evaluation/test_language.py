"""Off-target translations are noticed in the languages of the sample corpora."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lander_ds.evaluation.language import LanguageIdentifier, identifier_code
from lander_ds.evaluation.scripts import script_of

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
    "Latn": [
        "Ova opcija omogućava korisniku da izmeni podešavanja.",
        "Danas je lepo vreme i deca se igraju u parku.",
    ],
    "Cyrl": ["Молимо вас унесите лозинку поново.", "Данас је лепо време и деца се играју у парку (Firefox)."],
}
CHINESE = {
    "Hans": [
        "请输入您的用户名和密码。",
        "今天天气很好，孩子们在公园里玩。",
        "CPU 使用率过高，请检查系统设置。",
    ],
    "Hant": [
        "請輸入您的使用者名稱和密碼。",
        "今天天氣很好，孩子們在公園裡玩。",
        "CPU 使用率過高，請檢查系統設定。",
    ],
}


@pytest.mark.parametrize(
    ("texts", "codes"),
    [
        (
            SERBIAN,
            {"Latn": ["sr_Latn", "sr-Latn-RS", "srp_Latn"], "Cyrl": ["sr-Cyrl", "sr_cyrl", "srp_Cyrl"]},
        ),
        (
            CHINESE,
            {
                "Hans": ["zh_Hans", "zh-CN", "zho_Hans", "zh-Hans-SG"],
                "Hant": ["zh-Hant", "zh_TW", "zho_Hant", "zh-HK"],
            },
        ),
    ],
)
def test_the_other_script_of_a_language_is_off_target(
    texts: dict[str, list[str]], codes: dict[str, list[str]]
) -> None:
    for script, others in (tuple(codes), tuple(reversed(codes))):
        for code in codes[script]:
            identifier = LanguageIdentifier({"en", code})
            assert identifier.off_target(texts[script], code) == 0.0
            assert identifier.off_target(texts[others], code) == 1.0
            assert identifier.off_target(["Enter your user name and the password again."], code) == 1.0


def test_a_code_without_a_script_takes_any() -> None:
    identifier = LanguageIdentifier({"en", "sr", "zh"})
    for texts, language in ((SERBIAN, "sr"), (CHINESE, "zh")):
        assert identifier.off_target([text for own in texts.values() for text in own], language) == 0.0


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("de", None),
        ("pt-BR", None),
        ("deu_Latn", "latn"),
        ("zh-TW", "hant"),
        ("zh_hk", "hant"),
        ("zho_TW", "hant"),
        ("yue_Hans", "hans"),
        ("zh", None),
    ],
)
def test_scripts_of_codes(code: str, expected: str | None) -> None:
    assert script_of(code) == expected
