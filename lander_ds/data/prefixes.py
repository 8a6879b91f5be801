"""The frozen prefix, kept: hidden states below the lowest trained layer, once per training example, on disk.

A cache entry `<cache>/prefix-<hash>/` holds `part-R.bin`, what rank R has computed, as plain rows [tokens, d] in the
model's type, and `manifest.json`. Like prepared data it is written under another name and renamed when it is complete;
after that nothing in it changes, and runs that share `data.cache_dir` share it.

Examples are numbered through all pairs. Neighbours are computed together in *chunks*, whose bounds follow from the
lengths alone: what is stored does not depend on ranks, micro-batches or seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lander_ds.common.errors import ArtefactError
from lander_ds.common.files import flush, read_json, write_json
from lander_ds.data.batching.packing import Example
from lander_ds.data.batching.plan import GlobalBatch
from lander_ds.data.prepared import PreparedSplit

FORMAT = "lander-prefix-1"
CHUNK_TOKENS = 4096
"""Tokens that are computed together; a longer example is a chunk of its own."""


class Layout:
    """Which example stands where in an entry that a number of ranks have written."""

    def __init__(self, splits: Sequence[PreparedSplit], ranks: int) -> None:
        """Lay out the training examples.

        Args:
            splits: by pair id, and, where there are any, texts without a pair (-1) at the end.
            ranks: that compute; chunk c is computed by rank c mod `ranks`.
        """
        self._splits = splits
        sizes = [len(split) for split in splits]
        self._first = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.lengths = np.concatenate([split.lengths for split in splits]).astype(np.int64)
        """[n]: tokens of every example."""
        ends = np.cumsum(self.lengths)
        bounds = [0]
        while bounds[-1] < len(ends):
            before = int(ends[bounds[-1] - 1]) if bounds[-1] else 0
            fitting = int(np.searchsorted(ends, before + CHUNK_TOKENS, side="right"))
            bounds.append(max(fitting, bounds[-1] + 1))
        self.bounds = bounds
        """First example of every chunk, and n."""
        self.rows = [0] * ranks
        """Tokens in the part of every rank."""
        self.part = np.empty(len(ends), dtype=np.int32)
        """[n]: the rank whose part an example stands in."""
        self.row = np.empty(len(ends), dtype=np.int64)
        """[n]: its first row there."""
        for chunk, (begin, end) in enumerate(pairwise(bounds)):
            rank = chunk % ranks
            starts = np.cumsum(self.lengths[begin:end]) - self.lengths[begin:end]
            self.part[begin:end], self.row[begin:end] = rank, self.rows[rank] + starts
            self.rows[rank] += int(self.lengths[begin:end].sum())

    def number(self, pair_ids: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """Numbers of examples by pair and position in the pair's split."""
        numbers: np.ndarray = self._first[pair_ids % len(self._splits)] + indices
        return numbers

    def chunk(self, number: int) -> list[Example]:
        """The examples of a chunk; none where there is no such chunk. Sample ids mean nothing here."""
        if number + 1 >= len(self.bounds):
            return []
        examples = []
        for example in range(self.bounds[number], self.bounds[number + 1]):
            pair = int(np.searchsorted(self._first, example, side="right")) - 1
            input_ids, prompt_length = self._splits[pair].tokens(example - int(self._first[pair]))
            examples.append(Example(input_ids, prompt_length, pair, 0))
        return examples


class PartWriter:
    """Writes the part of one rank. What fails is remembered and not raised: other ranks wait for this one."""

    def __init__(self, directory: Path, rank: int) -> None:
        self._path = directory / part_file(rank)
        self.failure: str | None = None
        """The first error."""
        self._write(b"", "wb")

    def add(self, hidden: torch.Tensor) -> None:
        """Append rows [T, d]."""
        self._write(hidden.contiguous().view(torch.uint8).numpy().data, "ab")

    def close(self) -> None:
        """Return when everything is on disk."""
        if self.failure is None:
            flush(self._path)

    def _write(self, content: Any, mode: str) -> None:
        if self.failure is not None:
            return
        try:
            with self._path.open(mode) as stream:
                stream.write(content)
        except OSError as error:
            self.failure = str(error)


def part_file(rank: int) -> str:
    """Name of a rank's part."""
    return f"part-{rank}.bin"


def write_manifest(directory: Path, digest: str, layout: Layout) -> None:
    """Say what an entry holds, once every part is there."""
    write_json(directory / "manifest.json", {"format": FORMAT, "hash": digest, "rows": layout.rows})


def writers(entry: Path, digest: str, row_bytes: int) -> int | None:
    """How many ranks have written an entry; None where there is no whole one."""
    try:
        manifest: dict[str, Any] = read_json(entry / "manifest.json", "")
    except ArtefactError:
        return None
    if manifest.get("format") != FORMAT or manifest.get("hash") != digest:
        return None
    rows = manifest["rows"]
    parts = [entry / part_file(rank) for rank in range(len(rows))]
    whole = all(
        part.is_file() and part.stat().st_size == count * row_bytes
        for part, count in zip(parts, rows, strict=True)
    )
    return len(rows) if whole else None


class Prefixes:
    """Reads an entry through memory maps."""

    def __init__(self, entry: Path, layout: Layout, layer: int, width: int, dtype: torch.dtype) -> None:
        """Open a whole entry.

        Args:
            entry: its directory.
            layout: for as many ranks as have written it.
            layer: the decoder layer that the hidden states come into.
            width: d.
            dtype: of the hidden states.
        """
        self.layer = layer
        """The decoder layer that the hidden states come into."""
        self._layout, self._width, self._dtype = layout, width, dtype
        self._parts = [
            torch.from_file(str(entry / part_file(rank)), shared=False, size=rows * width, dtype=dtype).view(
                rows, width
            )
            if rows
            else torch.empty(0, width, dtype=dtype)
            for rank, rows in enumerate(layout.rows)
        ]

    def of(self, batch: GlobalBatch, positions: np.ndarray) -> torch.Tensor:
        """Hidden states [T, d] of the examples at `positions` of a global batch, behind one another; one row of zeros
        for no example (the filler)."""
        if len(positions) == 0:
            return torch.zeros(1, self._width, dtype=self._dtype)
        layout = self._layout
        numbers = layout.number(batch.pair_ids[positions], batch.indices[positions])
        pieces = []
        for number in numbers.tolist():
            row = int(layout.row[number])
            pieces.append(self._parts[layout.part[number]][row : row + int(layout.lengths[number])])
        return torch.cat(pieces)
