"""Batched greedy search, sampling and beam search with a KV cache, through HF `generate`.

Prompts of a pair that begin alike (few-shot examples) share one KV cache: the common beginning is read once
per pair instead of once per sentence. Shapes: B sentences, P tokens of common beginning, R tokens of the
longest rest.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from lander_ds.config.schema.results import TranslateConfig
from lander_ds.inference.sampling import Sampler
from lander_ds.models.loading import positions_of

MIN_SHARED_TOKENS = 16
"""A shorter common beginning is not worth a forward pass of its own."""
ROUND = 8
"""Tokens that greedy search writes before it drops the rows that have come to an end."""


@dataclass(frozen=True)
class Hypothesis:
    """What the model wrote after a prompt."""

    text: str
    """What stands before the first line end or other stop, without surrounding white space."""
    tokens: int
    """Generated tokens, the closing one included."""
    truncated: bool
    """Whether the model was cut short: it had written `max_new_tokens` and not come to a stop."""
    score: float | None = None
    """Logarithm of its probability under the model over length to the power of the length penalty; None if only one was
    wanted."""


@dataclass(frozen=True)
class SharedPrefix:
    """The common beginning of a pair's prompts and what attention keeps of it."""

    length: int
    """P; 0 when nothing is shared."""
    cache: DynamicCache | None
    """Keys and values of one row; None when P is 0."""


NO_PREFIX = SharedPrefix(0, None)


class Decoder:
    """Decodes batches of prompts with one model.

    Args:
        model: a causal language model in eval mode.
        tokenizer: its tokenizer, with end-of-sequence and padding tokens.
        config: beams, length penalty, sampling, longest translation.
        synced: keep calling the model until every rank has finished its batch (ZeRO-3 needs all ranks in every call).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: TranslateConfig,
        synced: bool = False,
    ) -> None:
        self._model, self._tokenizer, self._synced = model, tokenizer, synced
        self._ends = end_tokens(model.generation_config, tokenizer)
        self._lines = line_end_tokens(tokenizer)
        self._positions = positions_of(model.config)
        self._pad = int(tokenizer.pad_token_id)
        self._sampling, self._length_penalty = config.sampling, config.length_penalty
        self._config = GenerationConfig(
            do_sample=False,
            num_beams=config.beams,
            # Transformers warns of one that is not used.
            length_penalty=config.length_penalty if config.beams > 1 else None,
            early_stopping=False,
            max_new_tokens=config.max_new_tokens,
            pad_token_id=self._pad,
            use_cache=True,
        )

    @torch.no_grad()
    def shared_prefix(self, prompts: Sequence[Sequence[int]]) -> SharedPrefix:
        """Read the common beginning of `prompts` once; `decode` of any of them can then start behind it.

        Models with a sliding window do without where a prompt and its translation might outgrow the window:
        padding between the prefix and the rest would push the prefix out of the window early.
        """
        length = common_prefix_length(prompts)
        longest = max(map(len, prompts)) + int(self._config.max_new_tokens)
        window = getattr(self._model.config, "sliding_window", None)
        if length < MIN_SHARED_TOKENS or (window is not None and longest > window):
            return NO_PREFIX
        row = torch.tensor([list(prompts[0][:length])], device=self._model.device)
        output = self._model(input_ids=row, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        return SharedPrefix(length, cache) if isinstance(cache, DynamicCache) else NO_PREFIX

    def decode(
        self, prompts: Sequence[Sequence[int]], prefix: SharedPrefix = NO_PREFIX, stop: str = ""
    ) -> list[Hypothesis]:
        """The best of `search`: B hypotheses in the order of the prompts."""
        return [best[0] for best in self.search(prompts, 1, prefix, stop)]

    @torch.no_grad()
    def search(
        self,
        prompts: Sequence[Sequence[int]],
        n_best: int,
        prefix: SharedPrefix = NO_PREFIX,
        stop: str = "",
    ) -> list[list[Hypothesis]]:
        """Continue every prompt up to the end of its line, an end token, or `stop`.

        Args:
            prompts: B token id sequences; all begin with the prefix.
            n_best: hypotheses per prompt; when searching, at most as many as there are beams.
            prefix: from `shared_prefix`.
            stop: text that ends a translation too; empty: none. Special tokens in it each end one.

        Returns:
            Per prompt, in their order, `n_best` hypotheses: the best first, or samples in the order of their numbers.
        """
        device, shared = self._model.device, prefix.length
        sampler = None
        if self._sampling.temperature:
            sampler = Sampler(self._sampling, prompts, n_best, device)
            prompts = [prompt for prompt in prompts for _ in range(n_best)]
        longest = max(map(len, prompts))
        # Left padding, behind the shared prefix: [B, P + R].
        padding = [longest - len(prompt) for prompt in prompts]
        rows = [
            [*prompt[:shared], *([self._pad] * pad), *prompt[shared:]]
            for prompt, pad in zip(prompts, padding, strict=True)
        ]
        mask = torch.ones(len(prompts), longest, dtype=torch.int64)
        for row, pad in enumerate(padding):
            mask[row, shared : shared + pad] = 0
        config = copy.copy(self._config)
        if self._positions is not None:
            # The last new token is not read again.
            config.max_new_tokens = max(1, min(config.max_new_tokens, self._positions - longest + 1))
        stop, special = split_stop(self._tokenizer, stop)
        ends = [*self._ends, *special]
        config.eos_token_id = list(dict.fromkeys([*ends, *self._lines]))
        arguments: dict[str, Any] = {}
        if sampler is not None:
            arguments["logits_processor"] = LogitsProcessorList([sampler])
        if stop:
            arguments["stopping_criteria"] = StoppingCriteriaList([_StopText(self._tokenizer, stop, longest)])
        if prefix.cache is not None:
            cache = copy.deepcopy(prefix.cache)
            cache.batch_repeat_interleave(len(prompts) * int(self._config.num_beams))
            arguments["past_key_values"] = cache
        if searches := n_best > 1 and sampler is None:
            config.num_return_sequences = n_best
            config.return_dict_in_generate = config.output_scores = True
        inputs = torch.tensor(rows, device=device), mask.to(device)
        with own_generation_config_hidden(self._model):
            if config.num_beams == 1 and not self._synced:
                written = self._greedy(*inputs, config, stop, arguments, sampler)
            else:
                output: Any = self._model.generate(
                    input_ids=inputs[0],
                    attention_mask=inputs[1],
                    generation_config=config,
                    synced_gpus=self._synced,
                    **arguments,
                )
                sequences = output.sequences if searches else output
                written = sequences[:, longest:].tolist()
        every = [self._hypothesis(row, ends, stop) for row in written]
        if n_best > 1:
            scores = output.sequences_scores.tolist() if sampler is None else self._scores(sampler, every)
            every = [replace(one, score=score) for one, score in zip(every, scores, strict=True)]
        return [every[first : first + n_best] for first in range(0, len(every), n_best)]

    def _greedy(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        config: GenerationConfig,
        stop: str,
        arguments: Mapping[str, Any],
        sampler: Sampler | None,
    ) -> list[list[int]]:
        """New tokens of each row by greedy search, over the noisy logits of a sampler where there is one.

        `generate` computes every row until the last one ends. Here it is called for `ROUND` tokens at a time, and
        rows that have ended are taken out in between: a sentence that runs on costs one row, not a batch.

        Args:
            ids: [B, P + R].
            mask: [B, P + R], of ids.
            config: of the whole search.
            stop: text that ends a row.
            arguments: further ones of `generate`, the sampler among them; `past_key_values` is used up.
            sampler: is told which rows go on.
        """
        longest, limit, ends = ids.shape[1], int(config.max_new_tokens), set(as_list(config.eos_token_id))
        options = dict(arguments)
        config.return_dict_in_generate = True
        written: list[list[int]] = [[] for _ in range(len(ids))]
        alive = list(range(len(ids)))
        while alive:
            begin = ids.shape[1]
            config.max_new_tokens = min(ROUND, limit - (begin - longest))
            output: Any = self._model.generate(
                input_ids=ids, attention_mask=mask, generation_config=config, **options
            )
            ids, cache = output.sequences, output.past_key_values
            full = ids.shape[1] - longest == limit
            rows = ids[:, longest:].tolist()
            running = []
            for position, (index, row) in enumerate(zip(alive, rows, strict=True)):
                written[index] = row
                ended = not ends.isdisjoint(row) or (
                    bool(stop) and stop in _padded(_decoded(self._tokenizer, [row])[0])
                )
                if not ended and not full:
                    running.append(position)
            alive = [alive[position] for position in running]
            if alive:
                kept = torch.tensor(running, device=ids.device)
                mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - begin), value=1)
                if len(running) < len(ids):
                    ids, mask = ids[kept], mask[kept]
                    cache.batch_select_indices(kept)
                    if sampler is not None:
                        sampler.keep(running)
                options["past_key_values"] = cache
        return written

    def _scores(self, sampler: Sampler, drawn: Sequence[Hypothesis]) -> list[float]:
        """Of the rows of a sampler."""
        return [
            sampler.log_probability(row, one.tokens) / one.tokens**self._length_penalty
            for row, one in enumerate(drawn)
        ]

    def _hypothesis(self, ids: list[int], ends: Sequence[int], stop: str) -> Hypothesis:
        closing = (index for index, token in enumerate(ids) if token in ends or token in self._lines)
        last = next(closing, None)
        # The closing token may hold text before the line end ('.\n' in byte-level vocabularies); an end token has none.
        written = ids if last is None else ids[: last + (ids[last] in self._lines)]
        text = _decoded(self._tokenizer, [written])[0]
        text, line_end, _ = text.partition("\n")
        before, stopped, _ = _padded(text).partition(stop) if stop else (text, "", "")
        if not stopped:
            return Hypothesis(
                text.strip(), len(ids) if last is None else last + 1, not (line_end or last is not None)
            )
        # A row that ends before the others of its batch is filled up.
        count = len(written)
        while count and written[count - 1] == self._pad:
            count -= 1
        return Hypothesis(before.strip(), count, truncated=False)


def _decoded(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> list[str]:
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [str(text) for text in texts]


def _padded(text: str) -> str:
    """With blanks around it: those of a separator such as ` ### ` are lost at the beginning and not written at the end."""
    return f" {text} "


class _StopText(StoppingCriteria):
    """Ends a row once it has written `stop`. (Transformers' own criterion fails with tokenizers that cannot spell a
    certain word.)"""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: str, begin: int) -> None:
        self._tokenizer, self._stop, self._begin = tokenizer, stop, begin
        # A token is at least a byte. More would do no harm; all would take time that grows with the square of the length.
        self._last = len(stop.encode()) + 4

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **options: Any) -> torch.BoolTensor:
        begin = max(self._begin, input_ids.shape[1] - self._last)
        blank = " " if begin == self._begin else ""
        stopped = [
            self._stop in blank + text for text in _decoded(self._tokenizer, input_ids[:, begin:].tolist())
        ]
        return torch.tensor(stopped, dtype=torch.bool, device=input_ids.device)  # type: ignore[return-value]


def split_stop(tokenizer: PreTrainedTokenizerBase, stop: str) -> tuple[str, list[int]]:
    """The text before the first special token in `stop` (decoded texts hold none), and the ids of all of them."""
    special = {
        str(token): index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special and str(token) in stop
    }
    text = stop[: min((stop.index(token) for token in special), default=len(stop))]
    return text if text.strip(" ") else "", list(special.values())


def end_tokens(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a text: the tokenizer's, and those of the model's generation configuration (several in chat models).
    Not that of config.json, which transformers fills with a number of its own where the file has none."""
    named = config.eos_token_id
    return list(dict.fromkeys([int(tokenizer.eos_token_id), *map(int, as_list(named))]))


def as_list(ids: Any) -> list[Any]:
    """Token ids as configurations name them: none, one, or a list."""
    return [] if ids is None else list(ids) if isinstance(ids, list | tuple) else [ids]


def line_end_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the tokens that hold a line end."""
    # '\n', its byte-level spelling, and its byte-fallback spelling; decoding each of 262k tokens would be
    # slow.
    spellings = ("\n", "\u010a", "<0x0A>")
    candidates = [
        index
        for token, index in tokenizer.get_vocab().items()
        if any(spelling in token for spelling in spellings)
    ]
    return sorted(index for index in candidates if "\n" in tokenizer.decode([index]))


def common_prefix_length(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens with which all prompts begin, leaving at least one token of each prompt."""
    first, last = min(map(tuple, prompts)), max(map(tuple, prompts))
    equal = next(
        (n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last))
    )
    return max(0, min(equal, min(map(len, prompts)) - 1))


@contextmanager
def own_generation_config_hidden(model: PreTrainedModel) -> Iterator[None]:
    """Keep the model's own generation_config (sampling, repetition penalties, ...) out of `generate`.

    `generate` fills what an explicit configuration leaves open from the model's own.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
