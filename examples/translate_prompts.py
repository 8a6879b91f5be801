#!/usr/bin/env python3
"""Translate the prompts of `lander translate --prompts` with CTranslate2 or llama.cpp, greedily.

    lander translate --run runs/demo --pair en-de --input news.txt --prompts --output news.json
    python examples/translate_prompts.py MODEL runs/demo/export/dense-en-de news.json > news.de.jsonl

MODEL is the directory that ct2-transformers-converter made of the export, or the GGUF file that convert_hf_to_gguf.py made
of it. Needs transformers, and ctranslate2 or xllamacpp. Standard output gets JSON lines with `line`, `src` and `hyp`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer


def generate(
    converted: Path, content: Mapping[str, Any], device: str, compute_type: str, longest: int
) -> list[list[int]]:
    """New tokens after each prompt, the closing one included.

    Args:
        converted: a directory for CTranslate2, or a GGUF file for llama.cpp.
        content: what `lander translate --prompts` wrote.
        device: `cpu`, `cuda` or `auto`.
        compute_type: of CTranslate2, for example `int8`. With `float32` llama.cpp keeps keys and values in it too.
        longest: most new tokens.
    """
    run = _with_ctranslate2 if converted.is_dir() else _with_llama_cpp
    return run(converted, content, device, compute_type, longest)


def _with_ctranslate2(
    converted: Path, content: Mapping[str, Any], device: str, compute_type: str, longest: int
) -> list[list[int]]:
    import ctranslate2

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


def _with_llama_cpp(
    converted: Path, content: Mapping[str, Any], device: str, compute_type: str, longest: int
) -> list[list[int]]:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(converted)
    parameters.n_parallel = 1
    parameters.n_ctx = longest + max((len(prompt["ids"]) for prompt in content["prompts"]), default=0)
    parameters.verbosity = 0
    if device == "cpu":
        parameters.n_gpu_layers = 0
    if compute_type == "float32":
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(parameters)
    ends = frozenset(content["end_ids"])
    return [_complete(server, prompt["ids"], ends, longest) for prompt in content["prompts"]]


def _complete(server: Any, prompt: list[int], ends: frozenset[int], longest: int) -> list[int]:
    """What llama.cpp writes until one of `ends`; by itself it ends at ends of sequences and turns alone."""
    written: list[int] = []
    failures: list[str] = []

    def receive(chunk: Mapping[str, Any]) -> bool:
        # What is raised in here is lost.
        if "error" in chunk:
            failures.append(chunk["error"]["message"])
            return True
        # Ids stand beside probabilities alone, and the last chunk has none.
        scores = chunk["choices"][0].get("logprobs") or {"content": ()}
        written.extend(token["id"] for token in scores["content"])
        return not ends.isdisjoint(written)

    request = {"prompt": prompt, "temperature": 0, "max_tokens": longest, "logprobs": 1, "stream": True}
    server.handle_completions(request, receive)
    if failures:
        sys.exit(f"llama.cpp: {failures[0]}")
    return written


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
    parser.add_argument(
        "converted", type=Path, metavar="MODEL", help="CTranslate2's directory or a GGUF file"
    )
    parser.add_argument("export", help="the export that it was made from, for its tokenizer")
    parser.add_argument("prompts", type=Path, help="file of lander translate --prompts")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument(
        "--compute-type", default="default", help="float32; CTranslate2 knows others, for example int8"
    )
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
