"""How well a model predicts plain text of a language: what fine-tuning made it forget beyond translation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from lander_ds.common.console import progress
from lander_ds.common.errors import ArtefactError
from lander_ds.common.files import read_json
from lander_ds.data.tokens.text_encoder import TextEncoder
from lander_ds.distributed import collectives, process_group
from lander_ds.inference.translate import InferenceModel
from lander_ds.models.routed_ffn import NONE

LOSSES = "losses.json"
"""Name of the file beside a system's translations of a test set: language -> fields of `TextLoss`."""

BATCH_TOKENS = 512
"""Tokens read at one time, padding included: their logits fill half a gigabyte with a vocabulary of 262,144."""


@dataclass(frozen=True)
class TextLoss:
    """Sums over the texts of one language."""

    sentences: int
    """Texts."""
    tokens: int
    """Their tokens; the beginning of sequence in front of each is given and not counted."""
    bytes: int
    """Their length in UTF-8, which, unlike tokens, is the same for every tokenizer."""
    nats: float
    """Minus the logarithm of their probability."""


@dataclass(frozen=True)
class _Text:
    language: int
    ids: tuple[int, ...]
    """Beginning of sequence, then the text."""


@torch.no_grad()
def text_losses(
    model: InferenceModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, Sequence[str]],
    sharded: bool,
) -> dict[str, TextLoss]:
    """Read every text alone, without a prompt and as text of no pair, and add up the loss of its tokens (collective).

    Args:
        model: the model.
        tokenizer: its tokenizer.
        texts: by language.
        sharded: whether the weights are spread over the ranks, which then read equally many batches.
    """
    encoder, languages = TextEncoder(tokenizer), list(texts)
    # A tokenizer without a beginning of sequence separates texts by the end of sequence.
    opening = [] if encoder.opening else [int(tokenizer.eos_token_id)]
    rows = [
        _Text(number, (*opening, *ids))
        for number, language in enumerate(languages)
        for ids in encoder.prompts([("", text) for text in texts[language]])
    ]
    every = list(_batches(sorted(rows, key=lambda row: (-len(row.ids), row.language, row.ids))))
    mine = collectives.share(every)
    nats = torch.zeros(len(languages), dtype=torch.float64)
    with model.pair(NONE), progress("loss on plain text", len(mine)) as bar:
        for batch in mine:
            nats += _nats(model, batch, len(languages))
            bar.advance(1)
        if sharded and len(mine) < math.ceil(len(every) / process_group.world_size()):
            _nats(model, every[-1], len(languages))
    collectives.sum_over_ranks(nats)
    tokens = [0] * len(languages)
    for row in rows:
        tokens[row.language] += len(row.ids) - 1
    return {
        language: TextLoss(
            sentences=len(texts[language]),
            tokens=tokens[number],
            bytes=sum(len(text.encode()) for text in texts[language]),
            nats=float(nats[number]),
        )
        for number, language in enumerate(languages)
    }


def _batches(rows: Sequence[_Text]) -> Iterator[list[_Text]]:
    """Rows of like length, the longest first, as many as fit `BATCH_TOKENS` once they are padded."""
    start = 0
    while start < len(rows):
        count = max(1, BATCH_TOKENS // len(rows[start].ids))
        yield list(rows[start : start + count])
        start += count


def _nats(model: InferenceModel, batch: Sequence[_Text], languages: int) -> torch.Tensor:
    """Sums by language [languages] float64."""
    device, longest = model.model.device, len(batch[0].ids)
    # Padding behind a text does not change what a causal model makes of it.
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(batch):
        ids[number, : len(row.ids)] = torch.tensor(row.ids)
        mask[number, : len(row.ids)] = 1
    logits = model.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
    sums = torch.zeros(languages, dtype=torch.float64)
    for number, row in enumerate(batch):
        targets = ids[number, 1 : len(row.ids)].to(device)
        own = logits[number, : len(row.ids) - 1].float()
        sums[row.language] += float(functional.cross_entropy(own, targets, reduction="none").double().sum())
    return sums


def read_losses(path: Path) -> dict[str, TextLoss]:
    """What stage translate wrote of a system, by language.

    Raises:
        ArtefactError: the file is missing or damaged.
    """
    cure = "run stage translate (again)"
    try:
        return {language: TextLoss(**fields) for language, fields in read_json(path, cure).items()}
    except (AttributeError, TypeError):
        raise ArtefactError(f"{path} holds no losses: {cure}") from None
