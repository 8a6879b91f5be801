"""HF data sets as corpora: a `save_to_disk` directory, or parquet, arrow or JSON files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets

from lander_ds.common.errors import DataError
from lander_ds.config.recipe import Split
from lander_ds.data.sources.corpus import Corpus
from lander_ds.data.sources.files import Advance
from lander_ds.data.sources.mappings import Located, rows_of_mappings
from lander_ds.data.sources.rows import Rejection, Row

# Names under which data sets keep a split; the first that exists is read.
SPLIT_NAMES: Mapping[Split, tuple[str, ...]] = {
    "train": ("train",),
    "detect": ("detect", "train"),
    "valid": ("valid", "validation", "dev"),
    "test": ("test",),
}

BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}


def read_hf(corpus: Corpus, advance: Advance) -> Iterator[Row | Rejection]:
    """The rows of a data set; it is streamed or memory-mapped, and nothing is written to a cache.

    Raises:
        DataError: `datasets` cannot open it, or it has several splits and none of the wanted name.
    """
    path = corpus.paths[0]
    size = (
        sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        if path.is_dir()
        else path.stat().st_size
    )
    yield from rows_of_mappings(corpus, _rows(corpus, _choose_split(corpus, _open(path))))
    advance(size)


def _rows(corpus: Corpus, rows: Iterable[Mapping[str, Any]]) -> Iterator[Located]:
    number = 0
    try:
        for number, row in enumerate(rows, start=1):
            yield number, row
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise DataError(
            f"{corpus.name}: row {number + 1} cannot be read ({_reason(error)}): repair the data set"
        ) from None


def _open(path: Path) -> Any:
    try:
        if path.is_dir() and ((path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()):
            return datasets.load_from_disk(str(path))
        with tempfile.TemporaryDirectory() as unused_cache:
            if path.is_dir():
                return datasets.load_dataset(str(path), streaming=True, cache_dir=unused_cache)
            kind = BUILDERS.get(path.suffix.lower(), "json")
            return datasets.load_dataset(kind, data_files=str(path), streaming=True, cache_dir=unused_cache)
    except Exception as error:  # `datasets` raises whatever its file readers raise
        raise DataError(
            f"{path}: `datasets` cannot open it ({_reason(error)}): give a save_to_disk directory, or one "
            "with parquet, arrow or JSON files"
        ) from None


def _choose_split(corpus: Corpus, opened: Any) -> Any:
    if not isinstance(opened, dict):
        return opened
    if len(opened) == 1:
        return next(iter(opened.values()))
    for name in SPLIT_NAMES[corpus.split]:
        if name in opened:
            return opened[name]
    raise DataError(
        f"{corpus.name}: has the splits {', '.join(opened)} and none called {SPLIT_NAMES[corpus.split][0]} "
        f"({corpus.key}.split): give the directory of one split"
    )


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else 'no message'}"
