"""Kept hidden states: which example stands where, and what is read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lander_ds.data import prefixes
from lander_ds.data.batching.plan import GlobalBatch
from lander_ds.data.prefixes import Layout, PartWriter, Prefixes, write_manifest, writers
from lander_ds.data.prepared import PreparedSplit

WIDTH = 3
LENGTHS = ([4, 3, 5, 12], [2, 2, 9])


class Split(PreparedSplit):
    """Examples of given lengths; token t of example e is 100 e + t."""

    def __init__(self, pair: int, lengths: list[int]) -> None:
        self.pair, self.split = str(pair), "train"
        self.lengths = np.array(lengths, dtype=np.int32)

    def tokens(self, index: int) -> tuple[np.ndarray, int]:
        return 100 * index + np.arange(self.lengths[index], dtype=np.int32), 1


SPLITS = [Split(pair, lengths) for pair, lengths in enumerate(LENGTHS)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "CHUNK_TOKENS", 10)


def rows(pair: int, index: int) -> torch.Tensor:
    """[length, WIDTH] that differ in every example, token and column."""
    ids, _ = SPLITS[pair].tokens(index)
    return (1000.0 * pair + torch.from_numpy(ids).float())[:, None] + 0.25 * torch.arange(WIDTH)


def written(entry: Path, ranks: int) -> Layout:
    layout = Layout(SPLITS, ranks)
    entry.mkdir()
    parts = [PartWriter(entry, rank) for rank in range(ranks)]
    for chunk in range(len(layout.bounds) - 1):
        for example in layout.chunk(chunk):
            parts[chunk % ranks].add(rows(example.pair_id, int(example.input_ids[0]) // 100))
    for part in parts:
        part.close()
        assert part.failure is None
    write_manifest(entry, "digest", layout)
    return layout


def batch_of(*examples: tuple[int, int]) -> GlobalBatch:
    pairs, indices = np.array(examples, dtype=np.int64).T
    zeros = np.zeros(len(examples), dtype=np.int64)
    return GlobalBatch(0, pairs.astype(np.int32), indices, zeros, zeros.astype(np.int32), 1, zeros)


def test_chunks_depend_on_lengths_alone() -> None:
    for ranks in (1, 2, 5):
        layout = Layout(SPLITS, ranks)
        # 4 + 3, 5, 12 (longer than a chunk), 2 + 2, 9.
        assert layout.bounds == [0, 2, 3, 4, 6, 7]
        assert sum(layout.rows) == sum(map(sum, LENGTHS))
        assert [len(layout.chunk(number)) for number in range(6)] == [2, 1, 1, 2, 1, 0]
    assert Layout(SPLITS, 2).rows == [4 + 3 + 12 + 9, 5 + 2 + 2]
    assert Layout(SPLITS, 7).rows[5:] == [0, 0]


@pytest.mark.parametrize("ranks", [1, 2, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_read(tmp_path: Path, ranks: int, dtype: torch.dtype) -> None:
    layout = written(tmp_path / "entry", ranks)
    if dtype == torch.bfloat16:
        for part in (tmp_path / "entry").glob("part-*"):
            values = (
                torch.frombuffer(bytearray(part.read_bytes()), dtype=torch.float32)
                if part.stat().st_size
                else None
            )
            if values is not None:
                part.write_bytes(values.to(dtype).view(torch.uint8).numpy().tobytes())
    assert writers(tmp_path / "entry", "digest", WIDTH * dtype.itemsize) == ranks
    kept = Prefixes(tmp_path / "entry", layout, 2, WIDTH, dtype)
    examples = ((1, 2), (0, 3), (0, 0), (1, 0), (0, 1))
    actual = kept.of(batch_of((0, 2), *examples), np.arange(1, 6))
    assert torch.equal(actual, torch.cat([rows(*example) for example in examples]).to(dtype))
    filler = kept.of(batch_of((0, 0)), np.empty(0, dtype=np.int64))
    assert torch.equal(filler, torch.zeros(1, WIDTH, dtype=dtype))


def test_only_a_whole_entry_counts(tmp_path: Path) -> None:
    entry = tmp_path / "entry"
    assert writers(entry, "digest", 4 * WIDTH) is None
    written(entry, 2)
    assert writers(entry, "digest", 4 * WIDTH) == 2
    assert writers(entry, "another", 4 * WIDTH) is None
    assert writers(entry, "digest", 2 * WIDTH) is None
    with (entry / "part-1.bin").open("r+b") as part:
        part.truncate(8)
    assert writers(entry, "digest", 4 * WIDTH) is None


def test_a_failure_is_remembered(tmp_path: Path) -> None:
    part = PartWriter(tmp_path / "gone", 0)
    part.add(torch.zeros(2, WIDTH))
    part.close()
    assert "No such file" in str(part.failure)
