"""HF data sets as corpora."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from lander_ds.common.errors import DataError
from lander_ds.config.schema.data import ColumnConfig, CorpusConfig, DataConfig
from lander_ds.data.sources.corpus import resolve
from lander_ds.data.sources.readers import read
from lander_ds.data.sources.rows import Rejection, Row

ROWS = [{"translation": {"en": "a", "de": "ä"}}, {"translation": {"en": "b", "de": None}}]
COLUMNS = ColumnConfig("translation.{src}", "translation.{tgt}")


@pytest.fixture(autouse=True)
def home_cache_stays_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "home-cache"))


def read_all(path: Path, **config: object) -> list[Row | Rejection]:
    corpus = CorpusConfig(str(path), columns=COLUMNS, **config)  # type: ignore[arg-type]
    (resolved,) = resolve(DataConfig(("en-de",), (corpus,)))
    return list(read(resolved))


def check(items: list[Row | Rejection]) -> None:
    row, rejection = items
    assert isinstance(row, Row)
    assert isinstance(rejection, Rejection)
    assert (row.line, row.src, row.tgt) == (1, "a", "ä")
    assert (rejection.line, rejection.reason) == (2, "malformed")


def test_save_to_disk(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "ds")
    check(read_all(tmp_path / "ds"))


def test_split_of_a_saved_dictionary(tmp_path: Path) -> None:
    other = datasets.Dataset.from_list([{"translation": {"en": "x", "de": "y"}}])
    splits = {"train": other, "validation": datasets.Dataset.from_list(ROWS)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "ds")
    check(read_all(tmp_path / "ds", split="valid"))
    with pytest.raises(DataError, match=r"has the splits train, validation and none called test"):
        read_all(tmp_path / "ds", split="test")


def test_directory_of_parquet(tmp_path: Path) -> None:
    (tmp_path / "ds").mkdir()
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "ds" / "train-00000-of-00001.parquet")
    check(read_all(tmp_path / "ds"))
    check(read_all(tmp_path / "ds" / "train-00000-of-00001.parquet"))


def test_directory_of_json(tmp_path: Path) -> None:
    (tmp_path / "ds").mkdir()
    (tmp_path / "ds" / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    check(read_all(tmp_path / "ds"))


def test_directory_of_arrow(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (tmp_path / "ds").mkdir()
    os.rename(next((tmp_path / "saved").glob("*.arrow")), tmp_path / "ds" / "data.arrow")
    check(read_all(tmp_path / "ds"))


def test_nothing_is_written_to_the_home_cache(tmp_path: Path) -> None:
    test_directory_of_json(tmp_path)
    cache = tmp_path / "home-cache"
    assert not cache.exists() or not any(file.is_file() for file in cache.rglob("*"))


def test_missing_column_is_explained(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"english": "a", "german": "b"}]).save_to_disk(tmp_path / "ds")
    with pytest.raises(
        DataError, match=r"no line has 'translation\.en' \(the first has 'english', 'german'\)"
    ):
        read_all(tmp_path / "ds")


def test_directory_without_data(tmp_path: Path) -> None:
    (tmp_path / "ds").mkdir()
    (tmp_path / "ds" / "notes.md").write_text("nothing")
    with pytest.raises(DataError, match="`datasets` cannot open it"):
        read_all(tmp_path / "ds")


class TestTables:
    """CSV and TSV through `datasets`: cells are text."""

    CELLS = ("None", "null", "N/A", "nan", "007", "1", "")

    def read(self, path: Path) -> list[tuple[str, str]]:
        (corpus,) = resolve(DataConfig(("en-de",), (CorpusConfig(str(path), format="hf"),)))
        return [(row.src, row.tgt) for row in read(corpus) if isinstance(row, Row)]

    def test_cells_that_look_like_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "ds").mkdir()
        path = tmp_path / "ds" / "train.csv"
        path.write_text(
            "id,src,tgt\n" + "".join(f'{n},"a, {n}",{cell}\n' for n, cell in enumerate(self.CELLS))
        )
        expected = [(f"a, {n}", cell) for n, cell in enumerate(self.CELLS)]
        assert self.read(path) == self.read(path.parent) == expected

    def test_quotes_in_tsv_are_text(self, tmp_path: Path) -> None:
        (tmp_path / "ds").mkdir()
        rows = [('"Yes, he said', 'Ja"'), ("b", '"c'), ("d", "null")]
        text = "src\ttgt\n" + "".join(f"{src}\t{tgt}\n" for src, tgt in rows)
        (tmp_path / "ds" / "train.tsv").write_text(text)
        assert self.read(tmp_path / "ds") == self.read(tmp_path / "ds" / "train.tsv") == rows

    @pytest.mark.parametrize(
        ("compression", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
    )
    @pytest.mark.parametrize(("suffix", "sign"), [(".csv", ","), (".tsv", "\t")])
    def test_compressed(
        self, tmp_path: Path, compression: str, compress: Callable[[bytes], bytes], suffix: str, sign: str
    ) -> None:
        (tmp_path / "ds").mkdir()
        path = tmp_path / "ds" / f"train{suffix}{compression}"
        path.write_bytes(compress(f"src{sign}tgt\na{sign}null\n".encode()))
        assert self.read(path) == self.read(path.parent) == [("a", "null")]

    @pytest.mark.parametrize(
        "names",
        [
            ("en-de/a.jsonl", "en-fr/a.jsonl"),
            ("train.en-de.jsonl", "train.en-cs.jsonl"),
            ("de/x.jsonl", "fr/x.jsonl"),
            ("deu_Latn-eng_Latn/x.jsonl", "eng_Latn-fra_Latn/x.jsonl"),
        ],
    )
    def test_several_languages_are_not_mixed(self, tmp_path: Path, names: tuple[str, str]) -> None:
        for name in names:
            (tmp_path / "ds" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "ds" / name).write_text('{"src": "a", "tgt": "b"}\n')
        with pytest.raises(DataError, match=r"holds several languages .* name the sub-directory"):
            self.read(tmp_path / "ds")

    def test_other_folders_are_read_together(self, tmp_path: Path) -> None:
        for name in ("news", "books", "part-00"):
            (tmp_path / "ds" / name).mkdir(parents=True)
            (tmp_path / "ds" / name / "x.jsonl").write_text(json.dumps({"src": name, "tgt": "b"}) + "\n")
        assert len(self.read(tmp_path / "ds")) == 3

    @pytest.mark.parametrize("second", [{"other": 3}, {"src": 1, "tgt": ["x"]}, {"src": {"a": 1}, "tgt": 2}])
    def test_different_schemas_are_one_error_or_rejections(
        self, tmp_path: Path, second: dict[str, object]
    ) -> None:
        (tmp_path / "ds").mkdir()
        for name, row in (("a", {"src": "a", "tgt": "b"}), ("b", second)):
            datasets.Dataset.from_list([row]).to_parquet(tmp_path / "ds" / f"{name}.parquet")
        with pytest.raises(DataError, match=r"name one file or sub-directory .* differ in their columns"):
            self.read(tmp_path / "ds")
