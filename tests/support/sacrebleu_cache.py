"""sacreBLEU's cache as its downloader leaves it, in a directory of the test's own."""

from __future__ import annotations

import urllib.request
from collections.abc import Sequence
from pathlib import Path
from urllib.error import URLError

import pytest
from sacrebleu.dataset import DATASETS

from lander_ds.data.sources import sacrebleu_sets


def empty_sacrebleu_cache(monkeypatch: pytest.MonkeyPatch, cache: Path, name: str) -> Path:
    """Where a test set would lie; there is no network.

    Args:
        monkeypatch: of the test.
        cache: in place of `~/.sacrebleu`.
        name: the test set.
    """

    def refuse(url: str) -> None:
        raise URLError(f"no network for {url}")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    # sacreBLEU reads its environment variable once, when it is imported.
    monkeypatch.setattr(sacrebleu_sets, "SACREBLEU_DIR", str(cache))
    monkeypatch.setattr(DATASETS[name], "_outdir", str(cache / name))
    monkeypatch.setattr(DATASETS[name], "_rawdir", str(cache / name / "raw"))
    (cache / name).mkdir(parents=True)
    return cache / name


def fill_sacrebleu_cache(
    monkeypatch: pytest.MonkeyPatch, cache: Path, name: str, pair: str, lines: Sequence[tuple[str, str]]
) -> None:
    """Put source and reference lines of a test set into a cache."""
    directory = empty_sacrebleu_cache(monkeypatch, cache, name)
    for field, texts in zip(("src", "ref"), zip(*lines, strict=True), strict=True):
        file = directory / f"{name.replace('/', '_')}.{pair}.{field}"
        file.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
