"""The base's fingerprint sees every byte, stays cheap, and still recognises what version 0.1.0 recorded."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.golden_export import GOLDEN, GoldenRun, golden_run
from support.tiny_models import save, tiny_model

from lander_ds.cli.main import main
from lander_ds.common import hash_cache
from lander_ds.common.errors import ArtefactError
from lander_ds.common.files import file_hash, read_json
from lander_ds.export.delta import Delta
from lander_ds.method.awareness import Awareness
from lander_ds.method.selection import Selection
from lander_ds.models.files import SINGLE
from lander_ds.models.weights import base_fingerprint, is_base
from lander_ds.training.session import load_selection


def wide_base(directory: Path) -> Path:
    """A base of megabytes, of which 64 blocks of 4 KiB are a small part."""
    model = tiny_model("llama")
    model.resize_token_embeddings(20_000, mean_resizing=False)
    return save(model, directory)


def scale_norms(base: Path) -> None:
    """All layer norms x 1.5, in the very bytes of the file."""
    path = base / SINGLE
    times = path.stat()
    tensors = load_file(path)
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    for name, values in tensors.items():
        if "norm" in name:
            begin, end = header[name]["data_offsets"]
            content[start + begin : start + end] = (values * 1.5).numpy().tobytes()
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_scaled_layer_norms_are_another_base(tmp_path: Path) -> None:
    base = wide_base(tmp_path / "base")
    first = base_fingerprint(base)
    scale_norms(base)
    assert base_fingerprint(base) != first
    assert not is_base(first, base_fingerprint(base), base)


def test_every_byte_counts(tmp_path: Path) -> None:
    base = wide_base(tmp_path / "base")
    content = bytearray((base / SINGLE).read_bytes())
    seen = {base_fingerprint(base)}
    start = 8 + int.from_bytes(content[:8], "little")
    for position in range(start, len(content), len(content) // 7):
        content[position] ^= 1
        (base / SINGLE).write_bytes(content)
        seen.add(base_fingerprint(base))
    assert len(seen) == 1 + len(range(start, len(content), len(content) // 7))


def test_what_was_recorded_before_is_still_recognised(tmp_path: Path) -> None:
    run, base = GOLDEN / "run", tmp_path / "base"
    shutil.copytree(GOLDEN / "base", base)
    now = base_fingerprint(base)
    recorded = {
        "awareness": Awareness.load(run / "awareness.safetensors").metadata.base_fingerprint,
        "selection": Selection.load(run / "selection.safetensors").metadata["base_fingerprint"],
        "checkpoint": read_json(run / "checkpoints" / "step-4" / "state.json", "")["base_fingerprint"],
        "delta": Delta.open(run / "export" / "delta").fingerprint,
    }
    for name, value in recorded.items():
        assert value != now
        assert is_base(value, now, base), name
    scale_norms(base)
    for name, value in recorded.items():
        assert not is_base(value, base_fingerprint(base), base), name
    assert not is_base(None, now, base)


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is large and settled enough for its hash to be kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hash_cache, "SMALL", 10)
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * 40)
    settle(path)
    return path


def settle(path: Path, seconds: float = 60.0) -> None:
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns - int(seconds * 1e9)))


def count_hashing(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    hashed: list[Path] = []

    def counted(path: Path) -> str:
        hashed.append(path)
        return file_hash(path)

    monkeypatch.setattr(hash_cache, "file_hash", counted)
    return hashed


def test_a_large_file_is_hashed_once(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = count_hashing(monkeypatch)
    first = hash_cache.content_hash(cached)
    assert first == file_hash(cached)
    assert hash_cache.content_hash(cached) == first
    assert len(hashed) == 1


def test_a_change_that_keeps_size_and_time_is_seen(cached: Path) -> None:
    first, times = hash_cache.content_hash(cached), cached.stat()
    content = bytearray(cached.read_bytes())
    content[77] ^= 4
    with cached.open("r+b") as stream:
        stream.write(content)
    os.utime(cached, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert cached.stat().st_mtime_ns == times.st_mtime_ns
    assert hash_cache.content_hash(cached) == file_hash(cached) != first


def test_another_file_of_that_name_is_seen(cached: Path) -> None:
    first, times = hash_cache.content_hash(cached), cached.stat()
    other = cached.with_name("other")
    other.write_bytes(cached.read_bytes()[::-1])
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    other.replace(cached)
    assert hash_cache.content_hash(cached) == file_hash(cached) != first


def test_the_hash_of_a_file_just_written_is_not_kept(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached.write_bytes(b"new content, as long as it takes")
    hashed = count_hashing(monkeypatch)
    hash_cache.content_hash(cached)
    hash_cache.content_hash(cached)
    assert len(hashed) == 2


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"null", b"\xff\xfe", None])
def test_a_damaged_cache_is_computed_again(cached: Path, damage: bytes | None) -> None:
    first = hash_cache.content_hash(cached)
    [entry] = hash_cache.cache_directory().glob("*.json")
    digit = "0" if first[0] != "0" else "1"
    entry.write_bytes(
        entry.read_bytes().replace(first.encode(), (digit + first[1:]).encode()) if damage is None else damage
    )
    assert hash_cache.content_hash(cached) == first


def test_without_a_place_for_a_cache_it_only_takes_longer(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "occupied").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "occupied"))
    assert hash_cache.content_hash(cached) == file_hash(cached)


@pytest.fixture
def golden(tmp_path: Path) -> GoldenRun:
    return golden_run(tmp_path / "golden")


def test_a_changed_base_is_noticed_in_training_and_export(golden: GoldenRun) -> None:
    recipe = golden.recipe()
    load_selection(recipe, golden.run, base_fingerprint(golden.base))
    scale_norms(golden.base)
    with pytest.raises(
        ArtefactError, match=r"made for another base model.*run stages detect and select again"
    ):
        load_selection(recipe, golden.run, base_fingerprint(golden.base))
    with pytest.raises(ArtefactError, match=r"was trained from another base model"):
        golden.export("export.formats=[routed]")


def test_delta_apply_says_that_the_base_has_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned = wide_base(tmp_path / "base"), tmp_path / "tuned"
    shutil.copytree(base, tuned)
    tensors: dict[str, Any] = load_file(tuned / SINGLE)
    tensors["lm_head.weight"] += torch.ones(())
    save_file(tensors, tuned / SINGLE, metadata={"format": "pt"})
    assert main(["delta", "diff", str(base), str(tuned), str(tmp_path / "delta")]) == 0
    scale_norms(base)
    assert main(["delta", "apply", str(base), str(tmp_path / "delta"), str(tmp_path / "out")]) == 0
    assert "is not the base that" in " ".join(capsys.readouterr().err.split())
