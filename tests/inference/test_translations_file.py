"""The files of translations: round trip, and damage that is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from lander_ds.common.errors import ArtefactError
from lander_ds.inference.translations import Translation, read_translations, write_translations

MADE = [
    Translation("en-de:test:0", "a\u2028b", "ü", "", 1),
    Translation("en-de:test:1", 'quote " and \\', "日本", "x\u0085y", 7),
]


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "base" / "en-de.jsonl"
    write_translations(path, MADE)
    assert read_translations(path) == MADE
    assert [file.name for file in path.parent.iterdir()] == ["en-de.jsonl"]


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"en-de\.jsonl does not exist: run stage translate"):
        read_translations(tmp_path / "en-de.jsonl")


@pytest.mark.parametrize(
    "line",
    [
        b'{"id": "x", "src": "a", "ref": "b"}',
        b'{"id": 5, "src": "a", "ref": "b", "hyp": "c", "tokens": 1}',
        b'["id"]',
        b"\xff\xfe",
        b'{"id": "x", "src"',
    ],
)
def test_damaged_line(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "en-de.jsonl"
    write_translations(path, MADE)
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(ArtefactError, match="line 3 is not a translation"):
        read_translations(path)


def test_repeated_sentence(tmp_path: Path) -> None:
    path = tmp_path / "en-de.jsonl"
    write_translations(path, [*MADE, MADE[0]])
    with pytest.raises(ArtefactError, match="line 3 repeats the sentence id 'en-de:test:0'"):
        read_translations(path)


def test_a_file_of_an_older_version_has_nothing_truncated(tmp_path: Path) -> None:
    path = tmp_path / "en-de.jsonl"
    path.write_text('{"id": "a", "src": "b", "ref": "c", "hyp": "d", "tokens": 2}\n')
    assert read_translations(path) == [Translation("a", "b", "c", "d", 2, truncated=None)]
    write_translations(path, [Translation("a", "b", "c", "d", 2, truncated=True)])
    assert read_translations(path)[0].truncated
