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

PLACEHOLDERS = ("src", "src_lang", "tgt_lang", "src_name", "tgt_name", "context")

Prompt: TypeAlias = tuple[str, ...]
"""The text before a target, in pieces: the recipe's and the corpus's words by turns, beginning with the recipe's."""

SOURCE = "\0"
"""Stands for the source sentence in a filled template; no recipe can hold it."""
CONTEXT = "\1"
"""Stands for the sentences before it."""


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
        apart = ("src", "context")
        _check_placeholders(config.system, "system", [name for name in PLACEHOLDERS if name not in apart])
    _check_context(config, key)
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


def _check_context(config: PromptConfig, key: str) -> None:
    shown = "context" in _placeholders(config.request, key)
    if config.context and not shown:
        raise ConfigError(
            f"data.prompt.context: {config.context}, but data.prompt.{key} does not say where the context goes: add "
            f"{{context}}, for example {'{context}' + config.request!r}"
        )
    if shown and not config.context:
        raise ConfigError(
            f"data.prompt.{key}: has {{context}}, but data.prompt.context is 0: set it to the number of sentences, or "
            "take {context} out"
        )
    _check_placeholders(config.context_template, "context_template", ["context"])
    if config.context_template.format(context=CONTEXT).count(CONTEXT) != 1:
        raise ConfigError(
            "data.prompt.context_template: needs {context} once: write for example 'Context: {context}\\n'"
        )


def _check_placeholders(text: str, key: str, known: Sequence[str]) -> None:
    if unknown := sorted(_placeholders(text, key).difference(known)):
        allowed = ", ".join(f"{{{name}}}" for name in known)
        raise ConfigError(
            f"data.prompt.{key}: unknown placeholder {{{unknown[0]}}}: use {allowed}, or write {{{{ and }}}} for braces"
        )


def prompt_options(config: PromptConfig) -> dict[str, Any]:
    """What prompts depend on, as JSON values. Keys of the chat and of the context are there with a chat and a context
    alone; records of before they existed lack them."""
    options = asdict(config)
    if not config.context:
        del options["context"], options["context_template"], options["context_separator"]
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


def render_prompt(
    config: PromptConfig, pair: str, src: str, shots: Sequence[tuple[str, str]], context: Sequence[str] = ()
) -> Prompt:
    """The text before the target: few-shot examples with their translations, the source, the target prefix.

    Blanks that end the target prefix are left out here: `target_text` has them, because a tokenizer joins a
    blank with the word behind it.

    Args:
        config: template and separators; one that `check_prompt` accepts, and no chat.
        pair: translation direction.
        src: source sentence.
        shots: (source, target) examples to show first; `config.shots` does not matter here.
        context: sentences before the source in its document.
    """
    template = filled(config.template, config, pair)
    pieces = [""]
    for shot_src, shot_tgt in shots:
        append(pieces, template, [shot_src] * (len(template) - 1))
        pieces[-1] += config.target_prefix
        pieces += [shot_tgt, config.separator]
    append(pieces, template, [src] * (len(template) - 1), context_block(config, context))
    pieces[-1] += config.target_prefix.rstrip(" ")
    return tuple(pieces)


def context_block(config: PromptConfig, context: Sequence[str]) -> list[str]:
    """What stands in place of `{context}`, in pieces: the recipe's words, the sentences, the recipe's words; nothing where
    there is no context."""
    if not context:
        return []
    before, after = config.context_template.format(context=CONTEXT).split(CONTEXT)
    return [before, config.context_separator.join(context), after]


def target_text(config: PromptConfig, tgt: str) -> str:
    """What the model learns to write after a prompt: blanks that end the target prefix, and the translation."""
    prefix = config.target_prefix
    return prefix[len(prefix.rstrip(" ")) :] + tgt


def next_example(config: PromptConfig, pair: str) -> str:
    """The text by which a model that has seen few-shot examples begins one of its own: the separator, with the first
    words of the template where the separator is nothing but blanks. Only what stands before a line end, which ends every
    translation; empty where that is nothing but blanks."""
    separator = config.separator
    # Examples have no context.
    begins = filled(config.template, config, pair)[0].replace(CONTEXT, "")
    text = separator if separator.strip(" ") else separator + begins
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


def append(pieces: list[str], words: Sequence[str], texts: Sequence[str], block: Sequence[str] = ()) -> None:
    """Append words of a template and the texts between them to pieces that end with words.

    Args:
        pieces: of a prompt, by turns words and texts.
        words: may hold the mark of a context.
        texts: one fewer than words, or as many.
        block: from `context_block`, for every such mark.
    """
    for number, part in enumerate(words):
        first, *others = part.split(CONTEXT)
        pieces[-1] += first
        for other in others:
            if block:
                pieces[-1] += block[0]
                pieces += block[1:]
            pieces[-1] += other
        if number < len(texts):
            pieces += [texts[number], ""]


def filled(text: str, config: PromptConfig, pair: str) -> list[str]:
    """A template with everything but source and context filled in, cut where the source belongs.

    Args:
        text: the template, one that `check_prompt` accepts.
        config: names languages.
        pair: translation direction.
    """
    src_lang, tgt_lang = split_pair(pair)
    values = {"src": SOURCE, "context": CONTEXT, "src_lang": src_lang, "tgt_lang": tgt_lang}
    # Names only where the template asks for them: languages without a known name are fine otherwise.
    for name, code in (("src_name", src_lang), ("tgt_name", tgt_lang)):
        if name in _placeholders(text):
            values[name] = language_name(code, config.language_names)
    return text.format(**values).split(SOURCE)
