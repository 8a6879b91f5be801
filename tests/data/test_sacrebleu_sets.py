"""Test sets by sacreBLEU's names, from a cache; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from sacrebleu.dataset import DATASETS
from support.sacrebleu_cache import empty_sacrebleu_cache, fill_sacrebleu_cache

from lander_ds.common.errors import DataError
from lander_ds.config.schema.data import CorpusConfig, DataConfig, PromptConfig
from lander_ds.data.sources.corpus import resolve
from lander_ds.data.sources.readers import read
from lander_ds.data.sources.rows import Row
from lander_ds.data.sources.sacrebleu_sets import origin

WMT23 = """<?xml version="1.0" encoding="utf-8"?><dataset id="wmt23"><collection id="news">
<doc id="d1" origlang="en"><src lang="en"><p><seg id="1">One  house.</seg><seg id="2">Two.</seg></p></src>
<ref lang="de" translator="refB"><p><seg id="1">nein</seg><seg id="2">nein</seg></p></ref>
<ref lang="de" translator="refA"><p><seg id="1">Ein Haus.</seg><seg id="2">Zwei.</seg></p></ref></doc>
</collection></dataset>"""


def texts(config: CorpusConfig, pair: str) -> list[tuple[str, str]]:
    (corpus,) = resolve(DataConfig((pair,), (config,)))
    return [(row.src, row.tgt) for row in read(corpus) if isinstance(row, Row)]


def documents(config: CorpusConfig, context: int) -> list[str | None]:
    (corpus,) = resolve(DataConfig(("en-de",), (config,), prompt=PromptConfig(context=context)))
    return [row.document for row in read(corpus) if isinstance(row, Row)]


def test_lines_of_the_cache_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [("a house", "ein Haus"), ("two", "zwei")]
    fill_sacrebleu_cache(monkeypatch, tmp_path, "multi30k/2016", "en-de", lines)
    config = CorpusConfig("sacrebleu:multi30k/2016", "test")
    assert texts(config, "en-de") == lines
    backwards = CorpusConfig("sacrebleu:multi30k/2016", "test", swap=True)
    assert texts(backwards, "de-en") == [(target, source) for source, target in lines]


def test_documents_are_named_in_any_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_sacrebleu_cache(
        monkeypatch, tmp_path, "multi30k/2016", "en-de", [("a", "b"), ("c", "d"), ("e", "f")]
    )
    (source,) = tmp_path.rglob("*.en-de.src")
    source.with_suffix(".docid").write_bytes(b"caf\xe9\nbar\n")
    config = CorpusConfig("sacrebleu:multi30k/2016", "test")
    assert documents(config, 1) == ["caf\\xe9", "bar", None]
    assert documents(config, 0) == [None] * 3


def test_a_downloaded_archive_is_read_by_sacrebleu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several references that which sacreBLEU scores with."""
    directory = empty_sacrebleu_cache(monkeypatch, tmp_path, "wmt23") / "raw"
    xml = directory / DATASETS["wmt23"].langpairs["en-de"][0]
    xml.parent.mkdir(parents=True)
    xml.write_text(WMT23, encoding="utf-8")
    (directory / f"wmt23.{Path(DATASETS['wmt23'].data[0]).name}").write_text("unpacked already")
    lines = [("One house.", "Ein Haus."), ("Two.", "Zwei.")]
    config = CorpusConfig("sacrebleu:wmt23", "test")
    assert texts(config, "en-de") == lines
    # Where prompts show what comes before, it matters which document a line is of.
    assert documents(config, 0) == [None, None]
    assert documents(config, 1) == ["d1", "d1"]


@pytest.mark.parametrize(
    ("path", "pair", "message"),
    [
        (
            "sacrebleu:wmt32",
            "en-de",
            r"no test set 'wmt32' \(data\.corpora\[0\]\.path\): did you mean wmt24\?",
        ),
        ("sacrebleu:multi30k/2016", "de-en", r"has no de-en .*: it has en-cs, en-de, en-fr; set the pairs"),
        (
            "sacrebleu:multi30k/2016",
            "en-cs",
            r"en-cs is not in sacreBLEU's cache .*multi30k/2016 and cannot be made there \(.*no network.*"
            r"run `sacrebleu -t multi30k/2016 -l en-cs --echo src`",
        ),
    ],
)
def test_what_is_missing(
    path: str, pair: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty_sacrebleu_cache(monkeypatch, tmp_path, "multi30k/2016")
    with pytest.raises(DataError, match=message):
        resolve(DataConfig((pair,), (CorpusConfig(path, "test"),)))


def test_a_wrong_checksum_ends_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty_sacrebleu_cache(monkeypatch, tmp_path, "wmt23")

    def end(langpair: str) -> str:
        raise SystemExit(1)

    monkeypatch.setattr(DATASETS["wmt23"], "get_source_file", end)
    with pytest.raises(DataError, match="the file has a wrong checksum"):
        resolve(DataConfig(("en-de",), (CorpusConfig("sacrebleu:wmt23", "test"),)))


def test_origin() -> None:
    assert origin(CorpusConfig("sacrebleu:wmt23")) == {
        "description": "Official evaluation and system data for WMT23."
    }
    said = origin(CorpusConfig("sacrebleu:wmt18"))
    assert said is not None
    assert "citation" in said
    assert origin(CorpusConfig("news.jsonl")) is None
