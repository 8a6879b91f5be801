"""Prompts, language names and few-shot examples."""

from __future__ import annotations

import random

import pytest

from lander_ds.common.errors import ConfigError
from lander_ds.config.schema.data import PromptConfig
from lander_ds.data.tokens.languages import LANGUAGE_NAMES, language_name, split_pair
from lander_ds.data.tokens.prompt import (
    check_prompt,
    choose_shots,
    equal_prompts,
    next_example,
    render_prompt,
    shots_for,
)


def test_default_prompt() -> None:
    assert "".join(render_prompt(PromptConfig(), "en-de", "Hello {x}", ())) == "English: Hello {x}\nGerman:"


def test_few_shot_prompt() -> None:
    shots = [("one", "eins"), ("two", "zwei")]
    expected = "English: one\nGerman: eins\n\nEnglish: two\nGerman: zwei\n\nEnglish: three\nGerman:"
    assert "".join(render_prompt(PromptConfig(), "en-de", "three", shots)) == expected


def test_every_placeholder_and_override() -> None:
    config = PromptConfig(
        template="<{src_lang}|{tgt_lang}|{src_name}|{tgt_name}> {src} {{}}", language_names={"de": "Deutsch"}
    )
    assert "".join(render_prompt(config, "en-de", "s", ())) == "<en|de|English|Deutsch> s {}"


def test_names_are_only_needed_where_the_template_asks_for_them() -> None:
    check_prompt(PromptConfig(template="{src} =>"), ["xx-yy"])
    with pytest.raises(
        ConfigError, match=r"none is known for 'xx'.*data\.prompt\.language_names: \{xx: \.\.\.\}"
    ):
        check_prompt(PromptConfig(), ["xx-de"])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{tgt_name}:", r"\{src\} is missing"),
        ("{src} {target}", r"unknown placeholder \{target\}"),
        ("{src} {}", r"unknown placeholder \{\}"),
        ("{src} {", "braces"),
        ("{src.upper}", r"unknown placeholder \{src\.upper\}"),
    ],
)
def test_bad_templates(template: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.prompt\.template.*{message}"):
        check_prompt(PromptConfig(template=template), ["en-de"])


def test_language_names() -> None:
    assert len(LANGUAGE_NAMES) >= 100
    assert all(name == name.strip() and name[0].isupper() for name in LANGUAGE_NAMES.values())
    assert language_name("zh_Hant", {}) == "Traditional Chinese"
    assert language_name("de-AT", {}) == "German"
    assert language_name("gd", {}) == "Scottish Gaelic"
    assert [split_pair("en-de"), split_pair("en-pt-BR")] == [("en", "de"), ("en", "pt-BR")]
    with pytest.raises(ConfigError, match="not a pair"):
        split_pair("ende")


def test_shots_depend_on_the_seed_and_not_on_the_order_of_the_corpus() -> None:
    corpus = [(f"s{n}", f"t{n}") for n in range(500)]
    shuffled = random.Random(0).sample(corpus, len(corpus))
    chosen = choose_shots(corpus, 5, 1, "en-de")
    assert len(set(chosen)) == 5
    assert choose_shots([*shuffled, *shuffled], 5, 1, "en-de") == chosen
    assert choose_shots(corpus, 5, 2, "en-de") != chosen
    assert choose_shots(corpus, 3, 1, "en-de") == chosen[:3]
    assert choose_shots(corpus, 0, 1, "en-de") == []
    assert choose_shots(corpus[:2], 5, 1, "en-de") == choose_shots(corpus[:2], 2, 1, "en-de")


def test_a_prompt_does_not_show_its_own_answer() -> None:
    chosen = [("a", "b"), ("c", "d"), ("e", "f")]
    assert shots_for(chosen, ("x", "y"), 2) == [("a", "b"), ("c", "d")]
    assert shots_for(chosen, ("a", "b"), 2) == [("c", "d"), ("e", "f")]


@pytest.mark.parametrize(
    ("separator", "template", "expected"),
    [
        ("\n\n", "{src} =", ""),
        (" ### ", "{src} =", " ### "),
        ("  ", "English: {src} {tgt_name}:", "  English: "),
        (" ", "{src} =", ""),
        (" ", "English:\n{src} =", " English:"),
        (" ###\n", "{src} =", " ###"),
        ("\n###\n", "{src} =", ""),
        ("\t", "{src} =", "\t"),
        ("<|im_end|>", "{src} =", "<|im_end|>"),
    ],
)
def test_by_what_a_further_example_begins(separator: str, template: str, expected: str) -> None:
    assert next_example(PromptConfig(template=template, separator=separator), "en-de") == expected


class TestEqualPrompts:
    PAIRS = ("en-sr_Latn", "en-sr_Cyrl")

    def test_targets_that_the_prompt_does_not_tell_apart_are_refused(self) -> None:
        with pytest.raises(
            ConfigError, match=r"data\.prompt\.language_names: en-sr_Latn and en-sr_Cyrl .* Serbian"
        ):
            check_prompt(PromptConfig(), self.PAIRS)
        apart = {"sr_Latn": "Serbian (Latin)", "sr_Cyrl": "Serbian (Cyrillic)"}
        check_prompt(PromptConfig(language_names=apart), self.PAIRS)
        check_prompt(PromptConfig(template="{tgt_lang}: {src} ="), self.PAIRS)
        check_prompt(PromptConfig(), ("en-zh_Hans", "en-zh_Hant"))

    def test_a_template_without_the_target(self) -> None:
        with pytest.raises(
            ConfigError, match=r"template: en-de and en-fr get the same prompt.*add {tgt_name}"
        ):
            check_prompt(PromptConfig(template="{src_name}: {src} ="), ("en-de", "cs-de", "en-fr"))
        check_prompt(PromptConfig(template="{src} ="), ("en-de", "de-en"))

    def test_sources_may_look_alike(self) -> None:
        pairs = ("sr_Latn-en", "de-en", "sr_Cyrl-en")
        check_prompt(PromptConfig(), pairs)
        assert equal_prompts(PromptConfig(), pairs) == [("sr_Latn-en", "sr_Cyrl-en")]


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("deu_Latn", "German"),
        ("deu", "German"),
        ("por", "Portuguese"),
        ("por_BR", "Brazilian Portuguese"),
        ("zho_Hans", "Simplified Chinese"),
        ("zho_Hant", "Traditional Chinese"),
        ("arz_Arab", "Egyptian Arabic"),
        ("ace_Latn", "Acehnese"),
        ("nno_Latn", "Norwegian Nynorsk"),
        ("srp_Cyrl", "Serbian"),
        ("de_AT", "German"),
    ],
)
def test_names_of_three_letter_codes_and_those_of_flores(code: str, name: str) -> None:
    assert language_name(code, {}) == name


@pytest.mark.parametrize("code", ["xx", "qq-Latn", "klingon!", "x"])
def test_codes_of_no_language_have_no_name(code: str) -> None:
    with pytest.raises(ConfigError, match=r"none is known for .*add data\.prompt\.language_names"):
        language_name(code, {})
