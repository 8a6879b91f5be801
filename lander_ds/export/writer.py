"""Writing HF model directories: safetensors shards, tensor by tensor, and the small files beside them."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from lander_ds.families.weights import INDEX, SINGLE
from lander_ds.run import write_json

SHARD_BYTES = 4 * 1024**3
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
"""Files of a model directory that an export takes over as they are."""


class ShardWriter:
    """Collects tensors and writes a shard whenever enough have come together: memory stays at one shard."""

    def __init__(self, directory: Path, shard_bytes: int = SHARD_BYTES) -> None:
        """Write into `directory` (existing); shards hold at most `shard_bytes` where a single tensor does not exceed it."""
        self._directory, self._limit = directory, shard_bytes
        self._held: dict[str, torch.Tensor] = {}
        self._held_bytes = 0
        self._shards: list[list[str]] = []
        self._total = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Add one tensor."""
        size = tensor.numel() * tensor.element_size()
        if self._held and self._held_bytes + size > self._limit:
            self._flush()
        self._held[name] = tensor.contiguous()
        self._held_bytes += size
        self._total += size

    def _flush(self) -> None:
        save_file(self._held, self._directory / f"shard-{len(self._shards)}", metadata={"format": "pt"})
        self._shards.append(list(self._held))
        self._held, self._held_bytes = {}, 0

    def close(self) -> None:
        """Write what is left, give the shards their final names and write the index where there are several."""
        if self._held:
            self._flush()
        count = len(self._shards)
        if count == 1:
            (self._directory / "shard-0").rename(self._directory / SINGLE)
            return
        weight_map = {}
        for number, names in enumerate(self._shards):
            final = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            (self._directory / f"shard-{number}").rename(self._directory / final)
            weight_map.update(dict.fromkeys(names, final))
        write_json(
            self._directory / INDEX, {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        )


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer and generation files of a model directory."""
    for name in COMPANIONS:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
