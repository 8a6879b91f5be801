"""The prompt: what the model reads before the translation that it writes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import cache
from string import Formatter
from typing import Any, TypeAlias

from lander_ds.common.errors import ConfigError
from lander_ds.config.schema.data import PromptConfig
from lander_ds.data.tokens.languages import language_name, split_pair

PLACEHOLDERS = ("src", "src_lang", "tgt_lang", "src_name", "tgt_name")

Prompt: TypeAlias = tuple[str, ...]
"""The text before a target, in pieces: the recipe's and the corpus's words by turns, beginning with the recipe's."""

SOURCE = "\0"
"""Stands for the source sentence in a filled template; no recipe can hold it."""


def check_prompt(config: PromptConfig, pairs: Sequence[str]) -> None:
    """Refuse a prompt that cannot be rendered for every pair, or that hides which target language is wanted.

    Raises:
        ConfigError: the template is not a format string, has unknown placeholders or lacks `{src}`; a language has
            no name, or two target languages have the same.
    """
    # In a chat the template is the tokenizer's; the recipe writes what stands in it.
    key = "user" if config.chat else "template"
    used = _placeholders(config.request, key)
    if config.chat:
        used |= _placeholders(config.system, "system")
        _check_placeholders(config.system, "system", [name for name in PLACEHOLDERS if name != "src"])
    _check_placeholders(config.request, key, PLACEHOLDERS)
    if config.shots < 0:
        raise ConfigError(f"data.prompt.shots: {config.shots} is negative: use 0 or more")
    for pair in pairs:
        if len(filled(config.request, config, pair)) == 1:
            raise ConfigError(
                f"data.prompt.{key}: {{src}} is missing, so the model would never see the source: add it"
            )
    for one, other in equal_prompts(config, pairs):
        first, second = split_pair(one)[1], split_pair(other)[1]
        if first != second and "tgt_name" in used:
            name = language_name(first, config.language_names)
            raise ConfigError(
                f"data.prompt.language_names: {one} and {other} get the same prompt, because {first} and {second} are "
                f"both called {name}: name them apart, for example {{{first}: {name} A, {second}: {name} B}}"
            )
        if first != second and split_pair(one)[0] == split_pair(other)[0]:
            raise ConfigError(
                f"data.prompt.{key}: {one} and {other} get the same prompt, so nothing tells which language is "
                "wanted: add {tgt_name} or {tgt_lang}"
            )


def _check_placeholders(text: str, key: str, known: Sequence[str]) -> None:
    if unknown := sorted(_placeholders(text, key).difference(known)):
        allowed = ", ".join(f"{{{name}}}" for name in known)
        raise ConfigError(
            f"data.prompt.{key}: unknown placeholder {{{unknown[0]}}}: use {allowed}, or write {{{{ and }}}} for braces"
        )


def prompt_options(config: PromptConfig) -> dict[str, Any]:
    """What prompts depend on, as JSON values. Keys of the chat are there with a chat alone; records of before it
    existed lack them."""
    options = asdict(config)
    if not config.chat:
        del options["user"], options["system"]
    return options


def equal_prompts(config: PromptConfig, pairs: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs whose prompts for the same source are the same, each with the first such pair."""
    first: dict[tuple[str, ...], str] = {}
    texts = (config.request, config.system) if config.chat else (config.request,)

    def words(pair: str) -> tuple[str, ...]:
        return tuple(word for text in texts for word in filled(text, config, pair))

    twins = ((first.setdefault(words(pair), pair), pair) for pair in pairs)
    return [(one, other) for one, other in twins if one != other]


def render_prompt(config: PromptConfig, pair: str, src: str, shots: Sequence[tuple[str, str]]) -> Prompt:
    """The text before the target: few-shot examples with their translations, the source, the target prefix.

    Blanks that end the target prefix are left out here: `target_text` has them, because a tokenizer joins a
    blank with the word behind it.

    Args:
        config: template and separators; one that `check_prompt` accepts, and no chat.
        pair: translation direction.
        src: source sentence.
        shots: (source, target) examples to show first; `config.shots` does not matter here.
    """
    template = filled(config.template, config, pair)
    pieces = [""]
    for shot_src, shot_tgt in shots:
        _append(pieces, template, shot_src, config.target_prefix)
        pieces += [shot_tgt, config.separator]
    _append(pieces, template, src, config.target_prefix.rstrip(" "))
    return tuple(pieces)


def target_text(config: PromptConfig, tgt: str) -> str:
    """What the model learns to write after a prompt: blanks that end the target prefix, and the translation."""
    prefix = config.target_prefix
    return prefix[len(prefix.rstrip(" ")) :] + tgt


def next_example(config: PromptConfig, pair: str) -> str:
    """The text by which a model that has seen few-shot examples begins one of its own: the separator, with the first
    words of the template where the separator is nothing but blanks. Only what stands before a line end, which ends every
    translation; empty where that is nothing but blanks."""
    separator = config.separator
    text = separator if separator.strip(" ") else separator + filled(config.template, config, pair)[0]
    line = text.partition("\n")[0]
    return line if line.strip(" ") else ""


def choose_shots(
    examples: Iterable[tuple[str, str]], count: int, seed: int, pair: str
) -> list[tuple[str, str]]:
    """`count` examples of a corpus, always the same for the same seed, whatever the order of the corpus.

    The corpus is streamed; only `count` examples are held. Fewer come back when the corpus has fewer.
    """
    best: dict[int, tuple[str, str]] = {}
    for src, tgt in examples:
        best[seeded_hash(seed, f"shots:{pair}", src, tgt)] = (src, tgt)
        if len(best) > count:
            del best[max(best)]
    return [best[key] for key in sorted(best)]


def shots_for(
    chosen: Sequence[tuple[str, str]], example: tuple[str, str], count: int
) -> list[tuple[str, str]]:
    """The first `count` of `chosen` but the example itself: a prompt must not show its own answer."""
    return [shot for shot in chosen if shot != example][:count]


def seeded_hash(seed: int, purpose: str, src: str, tgt: str) -> int:
    """64 random-looking bits of a sentence pair, for seeded choices that do not depend on file order."""
    text = f"{seed}\0{purpose}\0{src}\0{tgt}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


@cache
def _placeholders(text: str, key: str = "template") -> frozenset[str]:
    try:
        return frozenset(name for _, name, _, _ in Formatter().parse(text) if name is not None)
    except ValueError as error:
        raise ConfigError(
            f"data.prompt.{key}: {error}: write {{{{ and }}}} for braces that are no placeholder"
        ) from None


def _append(pieces: list[str], template: Sequence[str], src: str, ending: str) -> None:
    """Append a template, its sources filled in, and what follows it, to pieces that end with the recipe's words."""
    first, *rest = template
    pieces[-1] += first
    for words in rest:
        pieces += [src, words]
    pieces[-1] += ending


def filled(text: str, config: PromptConfig, pair: str) -> list[str]:
    """A template with everything but the source filled in, cut where the source belongs.

    Args:
        text: the template, one that `check_prompt` accepts.
        config: names languages.
        pair: translation direction.
    """
    src_lang, tgt_lang = split_pair(pair)
    values = {"src": SOURCE, "src_lang": src_lang, "tgt_lang": tgt_lang}
    # Names only where the template asks for them: languages without a known name are fine otherwise.
    for name, code in (("src_name", src_lang), ("tgt_name", tgt_lang)):
        if name in _placeholders(text):
            values[name] = language_name(code, config.language_names)
    return text.format(**values).split(SOURCE)
