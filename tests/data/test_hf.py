"""HF data sets as corpora."""

from __future__ import annotations

import json
import os
from pathlib import Path

import datasets
import pytest

from lander_ds.common.errors import DataError
from lander_ds.config.recipe import ColumnConfig, CorpusConfig, DataConfig
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
