"""Awareness and selection files carry a hash of all their bytes: whatever happens to one is noticed on reading."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open
from support.golden_export import GOLDEN

from lander_ds.common.errors import ArtefactError
from lander_ds.method.awareness import Awareness
from lander_ds.method.selection import Selection

Loader = Callable[[Path], Awareness | Selection]
KINDS: dict[str, Loader] = {"awareness": Awareness.load, "selection": Selection.load}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def written(kind: str, tmp_path: Path) -> Path:
    """A file of the golden run, written by this version."""
    path = tmp_path / f"{kind}.safetensors"
    KINDS[kind](GOLDEN / "run" / path.name).save(path)
    return path


def assert_refused(kind: str, path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ArtefactError):
        KINDS[kind](path)


def test_every_flipped_bit_is_refused(kind: str, written: Path) -> None:
    content = written.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    generator = random.Random(3)
    bits = {*range(8 * 8, 8 * header, 7), *(generator.randrange(8 * len(content)) for _ in range(300))}
    for bit in sorted(bits):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        assert_refused(kind, written, bytes(changed))


def test_cuts_additions_and_overwritten_numbers_are_refused(kind: str, written: Path) -> None:
    content = written.read_bytes()
    for length in (0, 1, 8, 50, len(content) // 2, len(content) - 1):
        assert_refused(kind, written, content[:length])
    assert_refused(kind, written, content + b"\0")
    header = 8 + int.from_bytes(content[:8], "little")
    for start in range(header, len(content) - 8, len(content) // 9):
        other = (
            b"\1\0\0\0\0\0\0\0" if content[start : start + 8] != b"\1\0\0\0\0\0\0\0" else b"\2" + b"\0" * 7
        )
        assert_refused(kind, written, content[:start] + other + content[start + 8 :])


def test_equal_contents_are_equal_bytes(kind: str, written: Path, tmp_path: Path) -> None:
    KINDS[kind](written).save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == written.read_bytes()


def test_files_of_version_0_1_0_are_read(kind: str) -> None:
    path = GOLDEN / "run" / f"{kind}.safetensors"
    with safe_open(path, framework="pt") as file:
        assert list(file.metadata()) == [kind]
    KINDS[kind](path)
