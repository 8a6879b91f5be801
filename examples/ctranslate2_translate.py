#!/usr/bin/env python3
"""Translate the prompts of `lander translate --prompts` with CTranslate2. Needs ctranslate2 and transformers alone.

    lander translate --run runs/demo --pair en-de --input news.txt --prompts --output news.json
    ct2-transformers-converter --model runs/demo/export/dense-en-de --output_dir served
    python examples/ctranslate2_translate.py served runs/demo/export/dense-en-de news.json > news.de.jsonl

Standard output gets JSON lines with `line`, `src` and `hyp`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ctranslate2
from transformers import AutoTokenizer


def generate(
    converted: Path, content: Mapping[str, Any], device: str, compute_type: str, longest: int
) -> list[list[int]]:
    """New tokens after each prompt, the closing one included.

    Args:
        converted: what ct2-transformers-converter wrote.
        content: what `lander translate --prompts` wrote.
        device: `cpu` or `cuda`.
        compute_type: of CTranslate2, for example `int8`.
        longest: most new tokens.
    """
    generator = ctranslate2.Generator(str(converted), device=device, compute_type=compute_type)
    results = generator.generate_batch(
        [prompt["tokens"] for prompt in content["prompts"]],
        max_batch_size=16,
        max_length=longest,
        sampling_topk=1,
        include_prompt_in_result=False,
        end_token=content["end_ids"],
        return_end_token=True,
    )
    return [list(result.sequences_ids[0]) for result in results]


def text_of(ids: list[int], content: Mapping[str, Any], tokenizer: Any) -> str:
    """The translation in what was generated: the closing token may hold text before the line end that it is."""
    if ids and ids[-1] in content["end_ids"] and "\n" not in tokenizer.decode([ids[-1]]):
        ids = ids[:-1]
    text = str(tokenizer.decode(ids, skip_special_tokens=True)).partition("\n")[0]
    stop = content["stop"]
    return (f" {text} ".partition(stop)[0] if stop else text).strip()


def main() -> None:
    """Translate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("converted", type=Path, help="directory of ct2-transformers-converter")
    parser.add_argument("export", help="the export that it was made from, for its tokenizer")
    parser.add_argument("prompts", type=Path, help="file of lander translate --prompts")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--compute-type", default="default", help="for example float32, bfloat16, int8")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    arguments = parser.parse_args()
    content = json.loads(arguments.prompts.read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(arguments.export)
    generated = generate(
        arguments.converted, content, arguments.device, arguments.compute_type, arguments.max_new_tokens
    )
    for prompt, ids in zip(content["prompts"], generated, strict=True):
        row = {
            "line": prompt["line"],
            "src": prompt["src"],
            "hyp": text_of(ids, content, tokenizer),
        }
        sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
