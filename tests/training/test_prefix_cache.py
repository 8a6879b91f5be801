"""Filling the cache of the frozen prefix in one process: computed once, shared, refused where it cannot be written."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.compare import assert_same_training, metrics
from support.tiny_run import TinyRun

from lander_ds.checkpoint import checkpoint
from lander_ds.common.errors import ArtefactError
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.recipe import ModelConfig, Recipe
from lander_ds.config.schema.data import DataConfig
from lander_ds.config.schema.training import TrainConfig
from lander_ds.config.schema.types import Quantization
from lander_ds.data.batching.packing import PackedBatch
from lander_ds.data.batching.plan import GlobalBatch
from lander_ds.data.prefixes import Prefixes
from lander_ds.data.prepared import PreparedSplit
from lander_ds.distributed.engines.single_span import SingleSpan
from lander_ds.training.prefix_cache import open_prefixes

WIDTH = 4
PAIRS = ("en-de", "en-fr")


class Split(PreparedSplit):
    """Two examples, of which the tokens are known."""

    def __init__(self, pair: int) -> None:
        self.pair, self.split = PAIRS[pair], "train"
        self.lengths = np.array([3, 5], dtype=np.int32)
        self._number = pair

    def tokens(self, index: int) -> tuple[np.ndarray, int]:
        return 100 * self._number + 10 * index + np.arange(self.lengths[index], dtype=np.int32), 1


class Engine(SingleSpan):
    """Hidden states are token ids."""

    def __init__(self) -> None:
        self.calls = 0

    def hidden_states(self, batch: PackedBatch, layer: int) -> torch.Tensor:
        self.calls += 1
        return (layer * 1000.0 + batch.input_ids.float())[:, None].expand(-1, WIDTH)


Engine.__abstractmethods__ = frozenset()


class Case:
    """A run whose model and data are stand-ins."""

    def __init__(
        self, path: Path, layers: int = 2, base: str = "base", quantize: Quantization | None = None
    ) -> None:
        recipe = Recipe(
            str(path / "run"),
            ModelConfig("unused", dtype="float32", quantize=quantize),
            DataConfig(PAIRS, (), cache_dir=str(path / "cache")),
            "unused",
            train=TrainConfig(prefix_cache="disk"),
        )
        self.cache, self.engine = path / "cache", Engine()  # type: ignore[abstract]
        hf = SimpleNamespace(config=SimpleNamespace(hidden_size=WIDTH), dtype=torch.float32)
        model = SimpleNamespace(prefix_layers=layers, model=hf)
        self.start: Any = SimpleNamespace(recipe=recipe, run=RunDirectory(path / "run"))
        self.session: Any = SimpleNamespace(engine=self.engine, model=model, fingerprint=base)
        train = {pair: Split(number) for number, pair in enumerate(PAIRS)}
        self.data: Any = SimpleNamespace(split=lambda name: train, content_hash=lambda name: "content")

    def open(self) -> Prefixes | None:
        return open_prefixes(self.start, self.session, self.data, lambda doing: None)


def test_computed_once_and_shared(tmp_path: Path) -> None:
    for calls in (1, 0):
        case = Case(tmp_path)
        kept = case.open()
        assert kept is not None
        assert (kept.layer, case.engine.calls) == (2, calls)
        zeros = np.zeros(2, dtype=np.int64)
        batch = GlobalBatch(0, np.array([1, 0], dtype=np.int32), np.array([1, 0]), zeros, zeros, 1, zeros)
        expected = 2000.0 + torch.tensor([110, 111, 112, 113, 114, 0, 1, 2])
        assert torch.equal(kept.of(batch, np.arange(2)), expected[:, None].expand(-1, WIDTH))
    assert len(list(case.cache.iterdir())) == 1, "one entry, and nothing half-written"


def test_another_base_layer_or_quantisation_has_its_own(tmp_path: Path) -> None:
    others: tuple[dict[str, Any], ...] = (
        {},
        {"layers": 3},
        {"base": "other"},
        {"quantize": "nf4"},
        {"quantize": "int8"},
    )
    for other in others:
        case = Case(tmp_path, **other)
        case.open()
        assert case.engine.calls == 1
    assert len(list(tmp_path.glob("cache/prefix-*"))) == len(others)


def test_a_damaged_entry_is_computed_anew(tmp_path: Path) -> None:
    Case(tmp_path).open()
    next(tmp_path.glob("cache/prefix-*/part-0.bin")).write_bytes(b"")
    case = Case(tmp_path)
    assert case.open() is not None
    assert case.engine.calls == 1
    assert len(list(case.cache.iterdir())) == 1


def test_too_little_space_is_said_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(ArtefactError, match=r"0\.00 GB are free: make space, .* train\.prefix_cache: off"):
        case.open()
    assert case.engine.calls == 0
    assert list(case.cache.iterdir()) == []


def test_nothing_below_the_trained_layers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case = Case(tmp_path, layers=0)
    with caplog.at_level(logging.INFO):
        assert case.open() is None
    assert "layer 0 is trained, there is nothing below it to keep" in caplog.text
    off = Case(tmp_path)
    off.start.recipe = replace(off.start.recipe, train=TrainConfig())
    assert off.open() is None


@pytest.mark.distributed
def test_texts_without_a_pair_are_replayed_and_kept(world_1: TinyRun, world_2: TinyRun) -> None:
    """On one rank computed, on two read from the cache: the same training, of which the texts are a part."""
    one, two = world_1.run("replay-1"), world_2.run("replay-2")
    assert_same_training(two, one, 1e-4)
    record = metrics(one)[0]
    assert record["replay_loss"] > 0
    assert set(record["loss_per_pair"]) <= {"en-de", "en-fr", "en-es"}
    parts = [*record["loss_per_pair"].values(), record["replay_loss"]]
    assert min(parts) < record["loss"] < max(parts)
    assert "replay_loss" not in metrics(world_1.run("adamw-1"))[0]
    state = checkpoint.newest(one.checkpoints).state
    assert (state["replay_share"], len(state["replay_hash"])) == (0.4, 64)
