"""What several tests of the data room use."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lander_ds.config.recipe import Recipe

SAMPLE = Path(__file__).parents[2] / "examples" / "sample"

MakeRecipe = Callable[..., Recipe]


def write_jsonl(path: Path, rows: Iterable[Iterable[object]], keys: tuple[str, ...] = ("src", "tgt")) -> Path:
    """A corpus of rows with these keys."""
    lines = [json.dumps(dict(zip(keys, row, strict=True)), ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


STYLES: dict[str, dict[str, Any]] = {
    "sentencepiece's own": {},
    "llama": {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
    },
    "gemma": {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "user_defined_symbols": ["<start_of_turn>", "\n"],
    },
}


def sample_sentences(count: int) -> list[str]:
    lines = (SAMPLE / "train.en-ru.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    return [row[side] for row in map(json.loads, lines) for side in ("src", "tgt")]


def make_sentencepiece(
    directory: Path, style: str, kind: str = "unigram", byte_fallback: bool = True
) -> None:
    with (directory / "tokenizer.model").open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample_sentences(250)),
            model_writer=model,
            vocab_size=1200,
            model_type=kind,
            byte_fallback=byte_fallback,
            minloglevel=2,
            **STYLES[style],
        )


def make_byte_level(directory: Path) -> None:
    """A byte-level BPE tokenizer with a special token, one that only looks special, a word and a run of blanks."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample_sentences(300), trainer)
    tokenizer.add_special_tokens(["<|im_start|>"])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("<|im_end|>", "Computer", "  ")])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|im_start|>", add_bos_token=True
    ).save_pretrained(directory)
