"""Writes every JSON of this directory from the table below: `python ds_configs/generate.py`.

README.md gives the reason for every value; a test says that the files are what this script writes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lander_ds.config.deepspeed_topology import BUCKET_ELEMENTS

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Size:
    """What depends on the size of the model; numbers count elements."""

    kinds: tuple[str, ...]
    """The files that make sense for it."""
    whole: int
    """Tensors up to this size stay whole on every rank: norms and biases."""
    prefetch: int | None
    """The largest matrix of a decoder layer is fetched ahead; None: what DeepSpeed fetches and keeps by default."""
    live: int = 0
    """Gathered elements that may stay, and the distance within which they are used again."""
    gpu: bool = True
    """Written for GPUs; else for CPU ranks, which have no cores to spare for overlapping."""
    offload_weights: bool = False
    """`zero3_offload` keeps the shards of the weights on the host too, not the optimizer alone."""


SHARDED = ("zero3", "zero3_offload", "pipeline", "pipeline_zero3")
ALL = ("replicated", *SHARDED)
ZERO1 = ("replicated", "pipeline")

SIZES = {
    # Gemma 3. The demonstration's; gates stay whole too, the first matrix of which has 81,920 elements.
    "270m": Size(
        ("replicated", "zero3", "pipeline", "pipeline_zero3"), whole=100_000, prefetch=None, gpu=False
    ),
    # BLOOM. Up to 1b the whole gathered model may stay.
    "560m": Size(("replicated", "zero3", "pipeline"), whole=8_192, prefetch=1024 * 4096, live=1_000_000_000),
    # LLaMA 3.2. Offloading is for train.method: full.
    "1b": Size(ALL[:4], whole=8_192, prefetch=2048 * 8192, live=1_000_000_000),
    # LLaMA 2, Mistral. From here on about two decoder layers may stay.
    "7b": Size(ALL, whole=16_384, prefetch=4096 * 11008, live=500_000_000),
    # LLaMA 2.
    "13b": Size(ALL, whole=32_768, prefetch=5120 * 13824, live=700_000_000),
    # LLaMA 2. From here on the weights do not fit beside everything else, so they may go to the host.
    "70b": Size(SHARDED, whole=32_768, prefetch=8192 * 28672, live=2_000_000_000, offload_weights=True),
    # BLOOM. One layer may stay and its successor's largest matrix, which is also the embedding.
    "176b": Size(SHARDED, whole=65_536, prefetch=14336 * 57344, live=3_700_000_000, offload_weights=True),
}


def zero(size: Size, kind: str) -> dict[str, Any]:
    """The section `zero_optimization` of one file."""
    pipeline = kind.startswith("pipeline")
    section: dict[str, Any] = {"stage": 1 if kind in ZERO1 else 3}
    if kind == "zero3_offload":
        for name in ("offload_optimizer", "offload_param")[: 1 + size.offload_weights]:
            section[name] = {"device": "cpu", "pin_memory": True}
    # DeepSpeed does not overlap communication in pipelines.
    section["overlap_comm"] = size.gpu and not pipeline
    if size.gpu or kind not in ZERO1:
        section["contiguous_gradients"] = True
    section["reduce_bucket_size"] = BUCKET_ELEMENTS
    if kind in ZERO1:
        return section
    if pipeline:
        # Micro-batches take turns, so what DeepSpeed looks ahead in does not repeat.
        section |= {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}
    elif size.prefetch is not None:
        section["stage3_prefetch_bucket_size"] = size.prefetch
        section |= dict.fromkeys(("stage3_max_live_parameters", "stage3_max_reuse_distance"), size.live)
    section["stage3_param_persistence_threshold"] = size.whole
    return section


def text(size: Size, kind: str) -> str:
    """One file: what the recipe decides is "auto"; one line a key, and a section in one line but for ZeRO's."""
    content = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero(size, kind),
        "steps_per_print": 1_000_000,
    }
    return lines(content, "  ") + "\n"


def lines(members: dict[str, Any], indent: str) -> str:
    """A JSON object with a line for each member."""
    shown = [
        f'{indent}"{key}": {lines(value, "    ") if key == "zero_optimization" else json.dumps(value)}'
        for key, value in members.items()
    ]
    return "{\n" + ",\n".join(shown) + f"\n{indent[2:]}}}"


def files() -> dict[str, str]:
    """`<size>/<kind>.json` -> its text."""
    return {f"{name}/{kind}.json": text(size, kind) for name, size in SIZES.items() for kind in size.kinds}


if __name__ == "__main__":
    for path, content in files().items():
        (FOLDER / path).write_text(content, encoding="utf-8")
