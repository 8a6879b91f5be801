"""Losses on plain text: shared out over ranks, and the same however they are batched."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_translator import WORDS, TinyTranslator, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from torch.nn import functional

from lander_ds.common.errors import ArtefactError
from lander_ds.distributed import collectives, process_group
from lander_ds.inference import losses
from lander_ds.inference.losses import TextLoss, read_losses, text_losses

generator = random.Random(4)
TEXTS = {
    language: [" ".join(generator.choices(WORDS, k=generator.randrange(2, 20))) for _ in range(count)]
    for language, count in (("de", 7), ("fr", 4))
}


def measured(sharded: bool = False) -> tuple[dict[str, TextLoss], int]:
    """The losses, and how often the model was called."""
    model, calls = TinyTranslator(), []
    forward = model.model.forward

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(options)
        return forward(*arguments, **options)

    model.model.forward = counted
    result = text_losses(model, tiny_tokenizer(), TEXTS, sharded)
    assert model.pairs == ["none"]
    return result, len(calls)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several of them."""
    monkeypatch.setattr(losses, "BATCH_TOKENS", 30)


def test_batches_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, calls = measured()
    assert calls == 1
    monkeypatch.setattr(losses, "BATCH_TOKENS", 1)
    single, calls = measured()
    assert calls == sum(map(len, TEXTS.values()))
    for language, loss in whole.items():
        assert loss.sentences == len(TEXTS[language])
        assert loss.tokens == sum(len(text.split()) for text in TEXTS[language])
        assert single[language].nats == pytest.approx(loss.nats, rel=1e-5)


@pytest.mark.usefixtures("batches")
@pytest.mark.parametrize("sharded", [False, True])
def test_ranks_read_different_texts(monkeypatch: pytest.MonkeyPatch, sharded: bool) -> None:
    alone, batches = measured()
    ranks = 4
    assert batches % ranks, "or every rank would have as many anyway"
    monkeypatch.setattr(process_group, "world_size", lambda: ranks)
    monkeypatch.setattr(collectives, "sum_over_ranks", lambda tensor: tensor)
    parts, calls = [], []
    for rank in range(ranks):
        monkeypatch.setattr(process_group, "rank", lambda rank=rank: rank)
        part, count = measured(sharded)
        parts.append(part)
        calls.append(count)
    for language, loss in alone.items():
        assert sum(part[language].nats for part in parts) == pytest.approx(loss.nats, rel=1e-5)
        assert all(part[language].tokens == loss.tokens for part in parts)
    # All ranks must be in every call of a model that is spread over them.
    assert (len(set(calls)) == 1) is sharded


def test_a_beginning_of_sequence_is_given_and_not_counted() -> None:
    tokenizer, model = tiny_tokenizer(), TinyTranslator()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", None, [("<s>", 1)])
    loss = text_losses(model, tokenizer, {"de": ["w5 w6 w7"]}, sharded=False)["de"]
    ids = torch.tensor([tokenizer("w5 w6 w7")["input_ids"]])
    assert ids[0, 0] == 1
    with torch.no_grad():
        wanted = functional.cross_entropy(model.model(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
    assert loss.tokens == 3
    assert loss.nats == pytest.approx(float(wanted), rel=1e-5)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "losses.json"
    path.write_text('{"de": {"nats": 1.0}}')
    with pytest.raises(ArtefactError, match=r"losses\.json holds no losses: run stage translate"):
        read_losses(path)
