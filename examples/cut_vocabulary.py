#!/usr/bin/env python3
"""Cut the vocabulary of a model with a BPE tokenizer down to the pieces that some corpora use.

    cut_vocabulary.py models/gemma3-270m models/gemma3-270m-40k --keep 40000 corpora/train.*.jsonl

A quarter of a million pieces cost a small model most of its memory and much of its time. The cut model is another
base: compare only what was trained from the same one. Kept are the most frequent pieces of the texts, every character
of theirs, bytes, special tokens, and whatever these are merged from. Texts are JSON lines (`src`, `tgt`) or plain text.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

BYTE = re.compile(r"<0x[0-9A-F]{2}>")
BATCH = 2000
UNUSED = re.compile(r"<unused\d+>")


def texts_of(paths: Iterable[Path]) -> Iterator[str]:
    """Every text of the files."""
    for path in paths:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                if path.suffix == ".jsonl":
                    row = json.loads(line)
                    yield from (row["src"], row["tgt"])
                else:
                    yield line.rstrip("\n")


def count_pieces(tokenizer: Tokenizer, paths: Iterable[Path]) -> Counter[str]:
    """How often each piece occurs in the texts."""
    counts: Counter[str] = Counter()
    batch: list[str] = []

    def flush() -> None:
        for encoding in tokenizer.encode_batch(batch, add_special_tokens=False):
            counts.update(encoding.tokens)
        batch.clear()

    for text in texts_of(paths):
        batch.append(text)
        if len(batch) == BATCH:
            flush()
    flush()
    return counts


def choose_pieces(tokenizer: Mapping[str, Any], counts: Counter[str], keep: int) -> set[str]:
    """The pieces of the new vocabulary.

    Args:
        tokenizer: content of tokenizer.json.
        counts: occurrences of each piece.
        keep: how many of the most frequent ones stay, before characters, bytes and parts are added.
    """
    vocabulary = tokenizer["model"]["vocab"]
    chosen = {piece for piece, _ in counts.most_common(keep)}
    chosen |= {piece for piece in vocabulary if BYTE.fullmatch(piece)}
    chosen |= {character for piece in counts for character in piece if character in vocabulary}
    special = (token["content"] for token in tokenizer["added_tokens"])
    chosen |= {piece for piece in special if not UNUSED.fullmatch(piece)}
    # The first merge that makes a piece is the one that the tokenizer takes; its halves are needed, and theirs.
    parts: dict[str, tuple[str, str]] = {}
    for left, right in merges_of(tokenizer):
        parts.setdefault(left + right, (left, right))
    todo = list(chosen)
    while todo:
        for part in parts.get(todo.pop(), ()):
            if part not in chosen:
                chosen.add(part)
                todo.append(part)
    return chosen & set(vocabulary)


def merges_of(tokenizer: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The merges, whichever of the two notations the file uses."""
    for merge in tokenizer["model"]["merges"]:
        left, right = merge if isinstance(merge, list) else merge.split(" ", 1)
        yield left, right


def cut_tokenizer(tokenizer: dict[str, Any], new_ids: Mapping[str, int]) -> None:
    """Leave only the pieces of `new_ids` in the content of a tokenizer.json, with these ids."""
    model = tokenizer["model"]
    model["vocab"] = dict(new_ids)
    model["merges"] = [
        [left, right]
        for left, right in merges_of(tokenizer)
        if left in new_ids and right in new_ids and left + right in new_ids
    ]
    tokenizer["added_tokens"] = [
        {**token, "id": new_ids[token["content"]]}
        for token in tokenizer["added_tokens"]
        if token["content"] in new_ids
    ]
    _renumber(tokenizer.get("post_processor"), new_ids)


def _renumber(node: object, new_ids: Mapping[str, int]) -> None:
    """Special tokens of a post-processor: {"tokens": [...], "ids": [...]} at any depth."""
    if isinstance(node, list):
        for item in node:
            _renumber(item, new_ids)
    elif isinstance(node, dict):
        if "tokens" in node and "ids" in node:
            node["ids"] = [new_ids[piece] for piece in node["tokens"]]
        for item in node.values():
            _renumber(item, new_ids)


def cut_model(source: Path, out: Path, old_ids: Sequence[int], renumbered: Mapping[int, int]) -> int:
    """Write the model with these rows of its (tied) embedding; returns its parameters.

    Raises:
        ValueError: embedding and head are not tied.
    """
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    if not model.config.tie_word_embeddings:
        raise ValueError(f"{source}: only models whose head is tied to the embedding can be cut")
    rows = model.get_input_embeddings().weight.data[list(old_ids)].clone()
    model.resize_token_embeddings(len(old_ids))
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(rows)
    for config in (model.config, model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(config, name, None)
            if isinstance(value, int):
                setattr(config, name, renumbered[value])
            elif isinstance(value, list):
                setattr(config, name, [renumbered[each] for each in value])
    model.save_pretrained(out)
    return int(model.num_parameters())


def main() -> int:
    """Run; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="HF model directory with tokenizer.json")
    parser.add_argument("out", type=Path, help="directory to write; it must not exist")
    parser.add_argument("corpora", type=Path, nargs="+", help="files whose pieces stay")
    parser.add_argument("--keep", type=int, default=40000, help="most frequent pieces (%(default)s)")
    options = parser.parse_args()
    if options.out.exists():
        sys.stderr.write(f"cut_vocabulary: {options.out} exists: delete it or name another directory\n")
        return 2
    tokenizer = json.loads((options.model / "tokenizer.json").read_text(encoding="utf-8"))
    counts = count_pieces(Tokenizer.from_file(str(options.model / "tokenizer.json")), options.corpora)
    chosen = choose_pieces(tokenizer, counts, options.keep)
    vocabulary = tokenizer["model"]["vocab"]
    old_ids = sorted(vocabulary[piece] for piece in chosen)
    renumbered = {old: new for new, old in enumerate(old_ids)}
    new_ids = {piece: renumbered[vocabulary[piece]] for piece in sorted(chosen, key=vocabulary.__getitem__)}
    parameters = cut_model(options.model, options.out, old_ids, renumbered)
    cut_tokenizer(tokenizer, new_ids)
    (options.out / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    shutil.copy(options.model / "tokenizer_config.json", options.out)
    covered = sum(count for piece, count in counts.items() if piece in chosen) / counts.total()
    print(
        f"{options.out}: {len(old_ids)} of {len(vocabulary)} pieces, {covered:.2%} of the texts, "
        f"{parameters / 1e6:.0f} million parameters"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
