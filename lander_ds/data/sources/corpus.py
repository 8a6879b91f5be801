"""Which files a recipe's corpora are: placeholders filled, formats recognised, missing files reported."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from lander_ds.common.errors import DataError
from lander_ds.config.data_consistency import set_pairs, shown_pairs
from lander_ds.config.recipe import Recipe
from lander_ds.config.schema.data import (
    SACREBLEU,
    ColumnConfig,
    CorpusConfig,
    CorpusFormat,
    DataConfig,
    TextCorpusConfig,
    TextFormat,
)
from lander_ds.config.schema.types import Split
from lander_ds.data.sources.files import COMPRESSIONS, without_compression
from lander_ds.data.sources.sacrebleu_sets import sacrebleu_files
from lander_ds.data.tokens.languages import split_pair

FORMAT_OF_SUFFIX: dict[str, CorpusFormat] = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".tmx": "tmx",
    ".parquet": "hf",
    ".arrow": "hf",
}

TEXT_FORMAT_OF_SUFFIX: dict[str, TextFormat] = {
    ".txt": "text",
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "hf",
    ".arrow": "hf",
}

TEXT = "text"
"""Stands where the corpora of `data.replay` have no pair."""


@dataclass(frozen=True)
class Corpus:
    """One corpus of one pair: an entry of `data.corpora` with everything filled in; or one of `data.replay.corpora`."""

    key: str
    """Where it stands in the recipe, `data.corpora[0]`."""
    pair: str
    """The pair it serves, or `TEXT`."""
    split: Split
    """What it is for."""
    format: CorpusFormat | TextFormat
    """Never `auto`."""
    paths: tuple[Path, ...]
    """The file or directory; two files, source and target, for Moses, and a third with documents' names for sacreBLEU's."""
    src: str
    """Language of the side that the file calls source."""
    tgt: str
    """Language of the side that the file calls target."""
    columns: ColumnConfig
    """Column names without placeholders; of `TEXT` those of prompt (empty: there is none) and text."""
    swap: bool
    """Sources and targets change places after reading."""
    limit: int | None
    """At most so many rows that pass the filters."""

    @property
    def has_documents(self) -> bool:
        """Whether it says which document a row is of."""
        return self.columns.doc is not None or len(self.paths) == 3

    @property
    def name(self) -> str:
        """The file as a person writes it."""
        return str(self.paths[0])

    @property
    def content(self) -> str:
        """What one of its lines holds, for messages."""
        return "text" if self.pair == TEXT else "sentence pair"


def resolve(data: DataConfig) -> list[Corpus]:
    """Every corpus of every pair, in the order of the recipe.

    Raises:
        DataError: a file is missing or its format unknown, a test set cannot be had, a pair has no corpus, or scores are
            wanted of files without columns.
    """
    corpora = []
    for number, config in enumerate(data.corpora):
        key = f"data.corpora[{number}]"
        if unknown := [pair for pair in config.pairs if pair not in data.pairs]:
            raise DataError(f"{key}.pairs: {unknown[0]!r} is not one of data.pairs ({', '.join(data.pairs)})")
        if config.limit is not None and config.limit < 1:
            raise DataError(f"{key}.limit: {config.limit} keeps nothing: use 1 or more, or leave it out")
        pairs = config.pairs or data.pairs
        corpora += [_resolve_one(config, key, pair, data.prompt.context > 0) for pair in pairs]
    _check_complete(data, corpora)
    return corpora


def resolve_set(recipe: Recipe, name: str) -> list[Corpus]:
    """The corpora of a named test set: one per direction, and for directions outside `data.pairs` those of
    `evaluate.shots`, as training data, which few-shot examples come from.

    Raises:
        DataError: a file is missing or its format unknown, or a test set cannot be had.
    """
    config, pairs = recipe.evaluate.sets[name], set_pairs(recipe, name)
    documents = recipe.data.prompt.context > 0
    corpora = [_resolve_one(config, f"evaluate.sets.{name}", pair, documents) for pair in pairs]
    for number, source in enumerate(recipe.evaluate.shots):
        shown = [pair for pair in shown_pairs(recipe, source) if pair in pairs]
        resolved = (_resolve_one(source, f"evaluate.shots[{number}]", pair, False) for pair in shown)
        corpora += [replace(corpus, split="train") for corpus in resolved]
    return corpora


def resolve_replay(data: DataConfig) -> list[Corpus]:
    """Every corpus of `data.replay`, in the order of the recipe.

    Raises:
        DataError: a file is missing or its format unknown.
    """
    return [
        _resolve_text(config, f"data.replay.corpora[{number}]")
        for number, config in enumerate(data.replay.corpora)
    ]


def _resolve_text(config: TextCorpusConfig, key: str) -> Corpus:
    path, kind = Path(config.path), config.format
    if kind == "auto" and path.is_dir():
        kind = "hf"
    if kind == "auto" and path.exists():
        suffix = without_compression(path).suffix.lower()
        if suffix not in TEXT_FORMAT_OF_SUFFIX:
            known = ", ".join(TEXT_FORMAT_OF_SUFFIX)
            raise DataError(
                f"{path}: unknown kind of file ({key}.path): name it {known} (plain, .gz, .bz2, .xz or .zst), or set the "
                "format of this corpus"
            )
        kind = TEXT_FORMAT_OF_SUFFIX[suffix]
    _check_exists(path, kind, f"{key}.path")
    columns = ColumnConfig(src=config.columns.prompt or "", tgt=config.columns.text)
    return Corpus(key, TEXT, "train", kind, (path,), "", "", columns, False, config.limit)


def _check_complete(data: DataConfig, corpora: list[Corpus]) -> None:
    # One pair without training data is an oversight; a recipe that only evaluates has none at all.
    for split in ("train", "detect"):
        served = {corpus.pair for corpus in corpora if corpus.split == split}
        if served and (missing := [pair for pair in data.pairs if pair not in served]):
            raise DataError(
                f"data.corpora: no corpus with split: {split} serves {missing[0]}: add one, or remove the "
                "pair from data.pairs"
            )
    if without := [pair for pair in data.pairs if pair not in {corpus.pair for corpus in corpora}]:
        raise DataError(
            f"data.corpora: no corpus serves {without[0]}: add one, or remove the pair from data.pairs"
        )


def _resolve_one(config: CorpusConfig, key: str, pair: str, documents: bool) -> Corpus:
    """`documents`: whether it matters which document a line is of."""
    src, tgt = split_pair(pair)
    if config.swap:
        src, tgt = tgt, src

    def fill(text: str) -> str:
        return text.replace("{pair}", f"{src}-{tgt}").replace("{src}", src).replace("{tgt}", tgt)

    columns = replace(config.columns, src=fill(config.columns.src), tgt=fill(config.columns.tgt))
    kind: CorpusFormat
    paths: tuple[Path, ...]
    if config.path.startswith(SACREBLEU):
        kind, paths = "moses", sacrebleu_files(config.path, src, tgt, f"{key}.path")
        paths = paths if documents else paths[:2]
    else:
        kind, paths = _locate(Path(fill(config.path)), config.format, src, tgt, f"{key}.path")
    wanted = next((name for name in ("scores", "doc", "rejected") if getattr(columns, name)), None)
    if wanted is not None and kind in ("moses", "tmx"):
        raise DataError(
            f"{key}.columns.{wanted}: {paths[0]} has no columns (format {kind}): remove it, or give the corpus as JSON "
            "lines or TSV"
        )
    return Corpus(key, pair, config.split, kind, paths, src, tgt, columns, config.swap, config.limit)


def _locate(
    path: Path, kind: CorpusFormat, src: str, tgt: str, key: str
) -> tuple[CorpusFormat, tuple[Path, ...]]:
    if kind == "auto":
        kind = _recognise(path, src, tgt, key)
    if kind == "moses":
        return kind, _moses_sides(path, src, tgt, key)
    _check_exists(path, kind, key)
    return kind, (path,)


def _check_exists(path: Path, kind: str, key: str) -> None:
    if not path.exists():
        raise DataError(f"{path}: no such file or directory ({key}): correct the path")
    if path.is_dir() and kind != "hf":
        raise DataError(
            f"{path}: is a directory, but {kind} wants a file ({key}): name the file, or use format: hf"
        )


def _recognise(path: Path, src: str, tgt: str, key: str) -> CorpusFormat:
    suffix = without_compression(path).suffix.lower()
    if path.is_dir():
        return "hf"
    if path.exists() and suffix in FORMAT_OF_SUFFIX:
        return FORMAT_OF_SUFFIX[suffix]
    if _moses_candidates(path, src, tgt):
        return "moses"
    if path.exists():
        known = ", ".join(FORMAT_OF_SUFFIX)
        raise DataError(
            f"{path}: unknown kind of file ({key}): name it {known} (plain, .gz, .bz2, .xz or .zst), give a Moses "
            f"prefix with .{src} and .{tgt} behind it, or set the format of this corpus"
        )
    raise DataError(
        f"{path}: no such file or directory, and no Moses pair {path.name}.{src}, {path.name}.{tgt} ({key}): "
        "correct the path"
    )


def _moses_sides(path: Path, src: str, tgt: str, key: str) -> tuple[Path, Path]:
    candidates = _moses_candidates(path, src, tgt)
    if not candidates:
        raise DataError(
            f"{path}: no Moses pair there ({key}): {path.name}.{src} and {path.name}.{tgt} (plain, .gz, .bz2, .xz "
            "or .zst) must both exist"
        )
    return candidates[0]


def _moses_candidates(path: Path, src: str, tgt: str) -> list[tuple[Path, Path]]:
    # The path is the common prefix, or the file of the source side.
    prefixes = [path]
    if without_compression(path).suffix == f".{src}":
        prefixes.append(without_compression(path).with_suffix(""))
    sides = ((_side(prefix, src), _side(prefix, tgt)) for prefix in prefixes)
    return [(source, target) for source, target in sides if source is not None and target is not None]


def _side(prefix: Path, language: str) -> Path | None:
    for compression in ("", *COMPRESSIONS):
        file = prefix.with_name(f"{prefix.name}.{language}{compression}")
        if file.is_file():
            return file
    return None
