"""HF data sets as corpora: a `save_to_disk` directory, or parquet, arrow or JSON files."""

from __future__ import annotations

import csv
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from lander_ds.common.errors import DataError
from lander_ds.config.schema.types import Split
from lander_ds.data.sources.corpus import TEXT, Corpus
from lander_ds.data.sources.files import Advance
from lander_ds.data.sources.mappings import Located, rows_of_mappings
from lander_ds.data.sources.rows import Rejection, Row
from lander_ds.data.tokens.languages import is_known

# Names under which data sets keep a split; the first that exists is read.
SPLIT_NAMES: Mapping[Split, tuple[str, ...]] = {
    "train": ("train",),
    "detect": ("detect", "train"),
    "valid": ("valid", "validation", "dev"),
    "test": ("test",),
}

BUILDERS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
"""What `datasets` opens."""

_PAIR = re.compile(
    r"(?<![^\W_])([A-Za-z]{2,3}(?:_[A-Za-z]{2,4})?)-([A-Za-z]{2,3}(?:_[A-Za-z]{2,4})?)(?![^\W_])"
)


def read_hf(corpus: Corpus, advance: Advance) -> Iterator[Row | Rejection]:
    """The rows of a data set; it is streamed or memory-mapped, and nothing is written to a cache.

    Raises:
        DataError: `datasets` cannot open it, it has several splits and none of the wanted name, or it holds several
            language pairs or schemas.
    """
    path = corpus.paths[0]
    size = (
        sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        if path.is_dir()
        else path.stat().st_size
    )
    yield from rows_of_mappings(corpus, _rows(corpus, _choose_split(corpus, _open(corpus))))
    advance(size)


def _rows(corpus: Corpus, rows: Iterable[Mapping[str, Any]]) -> Iterator[Located]:
    number = 0
    try:
        for number, row in enumerate(rows, start=1):
            yield number, row
    except Exception as error:  # `datasets` raises whatever its file readers raise
        raise DataError(
            f"{corpus.name}: row {number + 1} cannot be read ({_reason(error)}): repair the data set, or name one "
            f"file or sub-directory in {corpus.key}.path if its files differ in their columns"
        ) from None


def _open(corpus: Corpus) -> Any:
    path = corpus.paths[0]
    try:
        if path.is_dir() and ((path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()):
            return datasets.load_from_disk(str(path))
        with tempfile.TemporaryDirectory() as unused_cache:
            if path.is_dir():
                files = [
                    file for file in sorted(path.rglob("*")) if file.is_file() and _suffix(file) in BUILDERS
                ]
                _check_one_pair(corpus, files)
                most = Counter(map(_suffix, files)).most_common(1)
                options = _table_options(corpus, most[0][0]) if most else {}
                return datasets.load_dataset(str(path), streaming=True, cache_dir=unused_cache, **options)
            kind, options = BUILDERS.get(_suffix(path), "json"), _table_options(corpus, _suffix(path))
            return datasets.load_dataset(
                kind, data_files=str(path), streaming=True, cache_dir=unused_cache, **options
            )
    except DataError:
        raise
    except Exception as error:  # `datasets` raises whatever its file readers raise
        raise DataError(
            f"{path}: `datasets` cannot open it ({_reason(error)}): give a save_to_disk directory, or one "
            "with parquet, arrow or JSON files; of a data set with several configurations, the directory of one"
        ) from None


def _suffix(path: Path) -> str:
    """What kind of file it is, without its compression."""
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path).suffix.lower()


def _table_options(corpus: Corpus, suffix: str) -> dict[str, Any]:
    """How CSV and TSV files are read: cells are text, whatever they look like, and TSV files do not quote."""
    if BUILDERS.get(suffix) != "csv":
        return {}
    # Or pandas takes `null`, `N/A` and `nan` for nothing, and 007 for a number.
    text = dict.fromkeys(corpus.columns.named, str)
    options: dict[str, Any] = {"converters": text, "keep_default_na": False, "na_filter": False}
    return options | ({"sep": "\t", "quoting": csv.QUOTE_NONE} if suffix == ".tsv" else {})


def _check_one_pair(corpus: Corpus, files: Sequence[Path]) -> None:
    """Refuse a directory whose names tell several language pairs, unless columns tell their rows apart."""
    columns = corpus.columns
    apart = columns.src.split(".")[-1] == corpus.src and columns.tgt.split(".")[-1] == corpus.tgt
    if apart or columns.src_lang or columns.tgt_lang or corpus.pair == TEXT:
        return
    root = corpus.paths[0]
    languages: dict[tuple[str, ...], str] = {}
    for file in files:
        name = file.relative_to(root).as_posix()
        folders = (part for part in file.relative_to(root).parts[:-1] if is_known(part))
        pairs = ("-".join(pair) for pair in _PAIR.findall(name) if all(map(is_known, pair)))
        if languages_of_file := (*folders, *pairs):
            languages.setdefault(tuple(dict.fromkeys(languages_of_file)), name)
    if len(languages) > 1:
        first, second = list(languages.values())[:2]
        raise DataError(
            f"{root}: holds several languages ({first}, {second}), which would all become {corpus.pair}: name the "
            f"sub-directory, file or configuration of one pair in {corpus.key}.path, e.g. with {{src}}-{{tgt}}, or set "
            f"{corpus.key}.columns.src_lang and .tgt_lang"
        )


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
