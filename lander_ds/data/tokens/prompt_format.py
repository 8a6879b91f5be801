"""The form of prompts: the recipe's own template, or the chat template that a tokenizer brings along."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lander_ds.common.errors import ConfigError
from lander_ds.config.schema.data import PromptConfig
from lander_ds.data.tokens.prompt import (
    SOURCE,
    Prompt,
    append,
    context_block,
    filled,
    next_example,
    render_prompt,
    target_text,
)
from lander_ds.data.tokens.text_encoder import control_tokens

_SAME_DAY = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}{{ '' }}"
"""Templates that tell the model today's date would give other prompts every day; this is the date that Llama's falls back
to."""


class PromptFormat(Protocol):
    """How prompts and targets are written."""

    end: str
    """The token that the model writes after a translation; empty: the tokenizer's end of sequence."""

    def prompt(
        self, pair: str, src: str, shots: Sequence[tuple[str, str]], context: Sequence[str] = ()
    ) -> Prompt:
        """What stands before the target: `shots`, (source, target) each, the sentences before the source, and the source."""

    def target(self, tgt: str) -> str:
        """What the model writes, without what ends it."""

    def stop(self, pair: str, shots: int) -> str:
        """Text that ends a translation, beside line ends and end tokens, after that many examples; empty: none."""


def prompt_format(config: PromptConfig, tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
    """The form that a recipe wants.

    Raises:
        ConfigError: `template: chat`, and the tokenizer has no chat template, or one that this does not work with.
    """
    return ChatFormat(config, tokenizer) if config.chat else _OwnFormat(config)


class _OwnFormat:
    """The recipe's template."""

    end = ""

    def __init__(self, config: PromptConfig) -> None:
        self._config = config

    def prompt(
        self, pair: str, src: str, shots: Sequence[tuple[str, str]], context: Sequence[str] = ()
    ) -> Prompt:
        return render_prompt(self._config, pair, src, shots, context)

    def target(self, tgt: str) -> str:
        return target_text(self._config, tgt)

    def stop(self, pair: str, shots: int) -> str:
        return next_example(self._config, pair) if shots else ""


class ChatFormat:
    """A user's turn with the source and the model's turn with the target, as the tokenizer's chat template writes turns.

    Examples are earlier turns. The template is rendered with marks in place of corpus text, so that no text is taken for
    a part of it, and models that think before they answer are asked not to (`enable_thinking`).
    """

    def __init__(self, config: PromptConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._prompts: dict[tuple[str, int], list[str]] = {}
        try:
            self._template = _SAME_DAY + tokenizer.get_chat_template()
        except ValueError:
            raise ConfigError(
                "data.prompt.template: chat, but the tokenizer has no chat template: take the tokenizer of an instruct "
                "model, or write a template"
            ) from None
        asked = self._render([{"role": "user", "content": SOURCE}], opens=True)
        answered = self._render(
            [{"role": "user", "content": SOURCE}, {"role": "assistant", "content": SOURCE}], opens=False
        )
        before, _, ending = answered.rpartition(SOURCE)
        # Some templates put a blank before an answer, and others begin it with one.
        gap = before.removeprefix(asked) if before.startswith(asked) else ""
        opening = asked + gap if not gap.strip(" ") else asked
        self._blanks = opening[len(opening.rstrip(" ")) :]
        longest_first = sorted(control_tokens(tokenizer), key=len, reverse=True)
        end = re.search("|".join(map(re.escape, longest_first)) or "(?!)", ending)
        self.end = end[0] if end else ""

    def prompt(
        self, pair: str, src: str, shots: Sequence[tuple[str, str]], context: Sequence[str] = ()
    ) -> Prompt:
        words = self._prompts.get((pair, len(shots)))
        if words is None:
            words = self._prompts[pair, len(shots)] = self._words(pair, len(shots))
        # The user's text may hold the source several times.
        times = (len(words) - 1 - len(shots)) // (len(shots) + 1)
        pieces, before = [""], len(shots) * (times + 1)
        append(pieces, words[:before], [text for one, other in shots for text in (*[one] * times, other)])
        append(pieces, words[before:], [src] * times, context_block(self._config, context))
        return (*pieces[:-1], pieces[-1].rstrip(" "))

    def target(self, tgt: str) -> str:
        return self._blanks + tgt

    def stop(self, pair: str, shots: int) -> str:
        return self.end

    def _words(self, pair: str, shots: int) -> list[str]:
        """What the template writes around the texts of a conversation with that many examples.

        Raises:
            ConfigError: it leaves texts out or repeats them.
        """
        request = SOURCE.join(filled(self._config.user, self._config, pair))
        turn = [{"role": "user", "content": request}, {"role": "assistant", "content": SOURCE}]
        system = "".join(filled(self._config.system, self._config, pair))
        messages = [{"role": "system", "content": system}] if system else []
        words = self._render([*messages, *turn * shots, turn[0]], opens=True).split(SOURCE)
        texts = shots * (request.count(SOURCE) + 1) + request.count(SOURCE)
        if len(words) != texts + 1:
            raise ConfigError(
                f"data.prompt.template: chat, but the tokenizer's chat template shows {len(words) - 1} of {texts} texts of "
                f"a conversation with {shots} examples: write a template"
            )
        return words

    def _render(self, messages: list[dict[str, str]], opens: bool) -> str:
        """The conversation as text; `opens`: with what the model's turn begins with."""
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages,
                    chat_template=self._template,
                    add_generation_prompt=opens,
                    tokenize=False,
                    enable_thinking=False,
                )
            )
        except (TemplateError, TypeError, ValueError) as error:
            cure = "remove data.prompt.system" if messages[0]["role"] == "system" else "write a template"
            raise ConfigError(
                f"data.prompt.template: chat, but the tokenizer's chat template fails ({error}): {cure}"
            ) from None
