"""How prompts and translations become token ids: a template may spell control tokens, corpus text never does.

A tokenizer turns the spelling of `</s>` or `<|im_end|>` into that token wherever it stands, also in a sentence about
markup. Here the control tokens go by other names that no text spells, and only the template is given those names.
Text that spells none has the ids that the tokenizer itself gives it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from lander_ds.data.tokens.prompt import Prompt

# Noncharacters of Unicode: they are not interchanged, so no text holds them.
NAME_BEGIN, NAME_END, CUT = "\ufdd0", "\ufdd1", "\ufdd2"

# An added token that is not special and has none of these is vocabulary: a word, a run of blanks.
MARKUP = re.compile(r"[<>\[\]{}|_]")

# A SentencePiece model spells a byte that has no piece `<0x0A>`; the split keeps text from doing so.
BYTE_SPELLING = r"<(?=0x[0-9A-F]{2}>)"


class TextEncoder:
    """Encodes prompts and translations with one tokenizer.

    Args:
        tokenizer: from `load_tokenizer`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        """The tokenizer."""
        controls = control_tokens(tokenizer)
        longest_first = sorted(controls, key=len, reverse=True)
        self._spelling = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._backend = _renamed(tokenizer, controls) if tokenizer.is_fast else None
        probe, begun = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
        start = next(n for n in range(len(begun) + 1) if begun[n : n + len(probe)] == probe)
        self.opening: list[int] = begun[:start]
        """What the tokenizer puts in front of every text: the beginning of sequence, or nothing."""
        first = tokenizer.convert_ids_to_tokens(probe)[:1]
        self._adds_prefix_space = bool(first) and first[0].startswith(("▁", "Ġ"))

    def prompts(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of prompts, begun as the tokenizer begins a text (once, where the template does so too)."""
        return [ids if self._is_begun(ids) else [*self.opening, *ids] for ids in self._encode(prompts)]

    def begins_itself(self, prompt: Prompt) -> bool:
        """Whether a prompt spells what the tokenizer puts in front of every text."""
        return bool(self.opening) and self._is_begun(self._encode([prompt])[0])

    def examples(
        self, prompts: Sequence[Prompt], targets: Sequence[str], end: str = ""
    ) -> list[tuple[list[int], int]]:
        """Token ids of prompt, target and end of sequence, and the length of the prompt, for many examples.

        Prompt and target are tokenised apart, so that generation, which starts from the prompt's ids, continues
        exactly what training has seen (I).

        Args:
            prompts: of a `PromptFormat`.
            targets: of the same.
            end: the token that ends an example; empty: end of sequence.
        """
        if self._adds_prefix_space:
            # The tokenizer supplies the space between prompt and target itself; a second one would double it.
            targets = [target.removeprefix(" ") for target in targets]
        endings = self._encode([("", target) for target in targets])
        last = self.tokenizer.convert_tokens_to_ids(end) if end else self.tokenizer.eos_token_id
        return [
            ([*prompt, *target, last], len(prompt))
            for prompt, target in zip(self.prompts(prompts), endings, strict=True)
        ]

    def _is_begun(self, ids: list[int]) -> bool:
        return ids[: len(self.opening)] == self.opening

    def _encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        if self._backend is None:
            return [self._encode_in_python(prompt) for prompt in prompts]
        texts = [
            "".join(
                piece if number % 2 else self._spelling.sub(lambda match: _name(match[0]), piece)
                for number, piece in enumerate(prompt)
            )
            for prompt in prompts
        ]
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _encode_in_python(self, prompt: Prompt) -> list[int]:
        # Whatever such a tokenizer's code does, half of a spelling is not that token.
        text = "".join(
            self._spelling.sub(lambda match: match[0][0] + CUT + match[0][1:], piece) if number % 2 else piece
            for number, piece in enumerate(prompt)
        )
        parts = [
            self.tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
            for part in text.split(CUT)
        ]
        return [token for part in parts for token in part]


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """Spellings of the tokens that are no text: special ones, and added ones that look like markup."""
    added = tokenizer.added_tokens_decoder.values()
    spellings = {token.content for token in added if token.special or MARKUP.search(token.content)}
    # A single character is an alphabet's, whatever role a tokenizer gives it besides.
    return frozenset(text for text in spellings.union(tokenizer.all_special_tokens) if len(text) > 1)


def _renamed(tokenizer: PreTrainedTokenizerBase, controls: frozenset[str]) -> Tokenizer:
    """The same tokenizer with the same ids, in which the control tokens have names that no text spells."""

    def name(text: Any) -> Any:
        return _name(text) if text in controls else text

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["padding"] = state["truncation"] = None
    for token in state["added_tokens"]:
        token["content"] = name(token["content"])
    model = state["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {name(piece): index for piece, index in model["vocab"].items()}
    else:
        model["vocab"] = [[name(piece), score] for piece, score in model["vocab"]]
    if "unk_token" in model:
        model["unk_token"] = name(model["unk_token"])
    if "merges" in model:
        merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        model["merges"] = [
            [left, right] for left, right in merges if controls.isdisjoint((left, right, left + right))
        ]
    backend: Tokenizer = Tokenizer.from_str(json.dumps(state))
    if model["type"] == "Unigram" and model.get("byte_fallback"):
        split = pre_tokenizers.Split(Regex(BYTE_SPELLING), "isolated")
        steps = [split] if backend.pre_tokenizer is None else [backend.pre_tokenizer, split]
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return backend


def _name(control: str) -> str:
    return NAME_BEGIN + control + NAME_END
