"""Prepared data: the tokenised corpora of a recipe as memory-mapped Arrow files, as stages read them.

A cache entry `<cache>/prepared-<hash>/` holds `{pair}.{split}.arrow`, `rejected.jsonl` and `manifest.json`.
It is written under another name and renamed when it is complete. `data/prepared.json` in the run directory
says which entry belongs to the run. Every named test set has an entry of its own, which `data/sets/NAME/prepared.json`
names, so that sets come and go without a change of what is trained on. So have the texts of `data.replay`
(`data/replay/prepared.json`), so that runs with and without them share the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute
import pyarrow.ipc

from lander_ds.common.errors import ArtefactError
from lander_ds.common.files import inside, json_hash, read_json
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.data_consistency import set_pairs, shown_pairs
from lander_ds.config.recipe import Recipe
from lander_ds.config.schema.data import CorpusConfig
from lander_ds.config.schema.types import Split
from lander_ds.data.sources.corpus import Corpus
from lander_ds.data.tokens.prompt import prompt_options

FORMAT = "lander-prepared-3"

TOKEN_COLUMNS = ("input_ids", "rejected")

CURE = "run stage prepare (again)"
STATISTICS = "statistics.json"
"""What became of the lines of every split, in a run directory's `data` and beside each further `prepared.json`."""


@dataclass(frozen=True)
class Sentence:
    """The text of one example."""

    id: str
    """`{pair}:{split}:{n}`, the same in every run on the same data."""
    src: str
    """Source text."""
    tgt: str
    """Target text (the reference)."""
    doc: str | None = None
    """The document it belongs to, in splits whose corpora name one; lines of a document stand behind one another."""


class PreparedSplit:
    """One split of one pair. Only lengths are in memory; the rest is read from the memory map."""

    def __init__(self, pair: str, split: str, path: Path) -> None:
        # What ArrowWriter of datasets has written; ranks need not wait for that library, and pandas with it.
        with pyarrow.memory_map(str(path)) as mapped, pyarrow.ipc.open_stream(mapped) as stream:
            table = stream.read_all()
        self.pair, self.split = pair, split
        self.lengths: np.ndarray = table.column("length").to_numpy()
        """[n] int32: tokens of prompt, target and end of sequence."""
        self._prompt_lengths: np.ndarray = table.column("prompt_length").to_numpy()
        self.target_lengths: np.ndarray = self.lengths - self._prompt_lengths
        """[n] int32: tokens of the target and the end of sequence."""
        self._texts = [name for name in ("id", "src", "tgt", "doc") if name in table.column_names]
        self.has_preferences = "rejected" in table.column_names
        """Whether some example has a worse translation too."""
        tokens = [name for name in TOKEN_COLUMNS if name in table.column_names]
        self._columns = {name: table.column(name) for name in (*self._texts, *tokens)}

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, index: int) -> tuple[np.ndarray, int]:
        """Token ids [length] int32 of prompt, target and end of sequence, and the length of the prompt."""
        ids: np.ndarray = self._columns["input_ids"][int(index)].values.to_numpy()
        return ids, int(self._prompt_lengths[index])

    def rejected(self, index: int) -> np.ndarray | None:
        """Token ids [length] int32 of prompt, worse translation and end of sequence; None for an example without one."""
        ids = self._columns["rejected"][int(index)].values if self.has_preferences else None
        if ids is None:
            return None
        prompt = self.tokens(index)[0][: self._prompt_lengths[index]]
        return np.concatenate([prompt, ids.to_numpy()])

    @cached_property
    def rejected_lengths(self) -> np.ndarray:
        """[n] int32: tokens of prompt, worse translation and end of sequence; 0 for examples without one."""
        if not self.has_preferences:
            return np.zeros_like(self.lengths)
        counts = pyarrow.compute.list_value_length(self._columns["rejected"]).fill_null(0).to_numpy()
        rejected: np.ndarray = np.where(counts > 0, counts + self._prompt_lengths, 0).astype(np.int32)
        return rejected

    def largest_id(self) -> int:
        """The largest token id in it; -1 when it is empty."""
        chunks = [
            chunk for name in TOKEN_COLUMNS if name in self._columns for chunk in self._columns[name].chunks
        ]
        return max((int(chunk.flatten().to_numpy().max(initial=-1)) for chunk in chunks), default=-1)

    def sentence(self, index: int) -> Sentence:
        """The text of an example."""
        return Sentence(**{name: self._columns[name][int(index)].as_py() for name in self._texts})

    def texts(self) -> Iterator[str]:
        """Every source, then every target."""
        for name in ("src", "tgt"):
            for chunk in self._columns[name].chunks:
                yield from chunk.to_pylist()


class PreparedData:
    """All prepared splits of a recipe."""

    def __init__(self, entry: Path) -> None:
        """Open a cache entry.

        Raises:
            ArtefactError: it is missing or damaged.
        """
        manifest = read_manifest(entry)
        self.pairs: tuple[str, ...] = tuple(manifest["pairs"])
        self.hash: str = manifest["hash"]
        """Name of the entry: everything that it was made from, test data included."""
        self._entry = entry
        self._splits: dict[str, dict[str, str]] = manifest["splits"]

    def split(self, split: Split) -> dict[str, PreparedSplit]:
        """The named split of every pair that has it, in the order of the recipe's pairs."""
        return {
            pair: PreparedSplit(pair, split, inside(self._entry, split_file(pair, split), self._entry))
            for pair in self.pairs
            if split in self._splits[pair]
        }

    def content_hash(self, *splits: Split) -> str:
        """Hash of the examples of `splits`: what a stage reads, and nothing of the splits that it does not read."""
        return json_hash(
            {pair: {split: of_pair.get(split) for split in splits} for pair, of_pair in self._splits.items()}
        )

    @staticmethod
    def load(run: RunDirectory, recipe: Recipe) -> PreparedData:
        """The data that stage prepare made for this recipe.

        Raises:
            ArtefactError: prepare has not run for this recipe's data, or its cache is gone.
        """
        return _open(run, recipe, run.data, prepared_options(recipe))

    @staticmethod
    def load_set(run: RunDirectory, recipe: Recipe, name: str) -> PreparedData:
        """A named test set: its split, and `train` of the directions that have few-shot examples of their own.

        Raises:
            ArtefactError: prepare has not run for this recipe's set, or its cache is gone.
        """
        return _open(run, recipe, set_directory(run, name), set_options(recipe, name))

    @staticmethod
    def load_replay(run: RunDirectory, recipe: Recipe) -> PreparedData | None:
        """The texts of `data.replay`, as `train` of one pair that is none; None where the recipe has none.

        Raises:
            ArtefactError: prepare has not run for this recipe's texts, or its cache is gone.
        """
        if not recipe.data.replay.corpora:
            return None
        return _open(run, recipe, replay_directory(run), replay_options(recipe))


@dataclass(frozen=True)
class NamedSet:
    """A named test set, prepared."""

    name: str
    """Its key in `evaluate.sets`."""
    pairs: tuple[str, ...]
    """Its directions."""
    split: Split
    """The split of `data` that it is."""
    data: PreparedData
    """Its entry; `train` are few-shot examples of directions outside `data.pairs`."""

    @staticmethod
    def load(run: RunDirectory, recipe: Recipe, name: str) -> NamedSet:
        """A set that stage prepare made for this recipe.

        Raises:
            ArtefactError: as `PreparedData.load_set`.
        """
        data = PreparedData.load_set(run, recipe, name)
        return NamedSet(name, set_pairs(recipe, name), recipe.evaluate.sets[name].split, data)


def _open(run: RunDirectory, recipe: Recipe, directory: Path, options: Mapping[str, Any]) -> PreparedData:
    pointer_path = directory / "prepared.json"
    pointer = read_json(pointer_path, CURE)
    if pointer.get("options_hash") != json_hash(options):
        raise ArtefactError(
            f"{pointer_path}: was made for other data options, another model or another seed: {CURE}"
        )
    return PreparedData(_entry(run, recipe, pointer_path, pointer.get("entry")))


def _entry(run: RunDirectory, recipe: Recipe, pointer: Path, entry: object) -> Path:
    """The cache entry that a pointer names: inside the run directory, or in the recipe's cache."""
    if isinstance(entry, str) and Path(entry).is_absolute():
        cache = recipe.data.cache_dir
        if cache is None or Path(entry).parent.resolve() != Path(cache).resolve():
            raise ArtefactError(
                f"{pointer}: {entry} lies neither in the run directory nor in data.cache_dir: {CURE}"
            )
        return Path(entry)
    return inside(run.path, entry, pointer)


def prepared_options(recipe: Recipe) -> dict[str, Any]:
    """Everything in a recipe that the prepared data depends on, as JSON values."""
    data = asdict(recipe.data)
    # Where the cache lies and how many processes fill it change nothing in it; replay has an entry of its own.
    del data["cache_dir"], data["workers"], data["seed"], data["replay"]
    data["corpora"] = [corpus_options(corpus) for corpus in recipe.data.corpora]
    if not recipe.data.filters.min_score:
        del data["filters"]["min_score"]
    # What a metric computes follows from its files, which are inputs of their own.
    del data["filters"]["quality"]
    if quality := recipe.data.filters.quality:
        data["filters"]["quality"] = {name: config.min for name, config in quality.items()}
    data["prompt"] = prompt_options(recipe.data.prompt)
    return {
        "data": data,
        "model": {"path": recipe.model.path, "trust_remote_code": recipe.model.trust_remote_code},
        "seed": recipe.data_seed,
    }


def set_options(recipe: Recipe, name: str) -> dict[str, Any]:
    """Everything in a recipe that a prepared test set depends on, as JSON values."""
    pairs, shots = set_pairs(recipe, name), recipe.evaluate.shots
    shown = [corpus_options(corpus) for corpus in shots if set(shown_pairs(recipe, corpus)) & set(pairs)]
    return {
        **prepared_options(recipe),
        "set": corpus_options(recipe.evaluate.sets[name]) | {"pairs": list(pairs)},
        "shots": shown,
    }


def replay_options(recipe: Recipe) -> dict[str, Any]:
    """Everything in a recipe that the prepared texts of `data.replay` depend on, as JSON values."""
    data, filters = recipe.data, recipe.data.filters
    return {
        "corpora": [asdict(corpus) for corpus in data.replay.corpora],
        "filters": [filters.min_chars, filters.drop_duplicates, filters.test_overlap],
        "max_length": data.max_length,
        "chat": data.prompt.chat,
        "sets": {name: corpus_options(config) for name, config in recipe.evaluate.sets.items()},
        "model": {"path": recipe.model.path, "trust_remote_code": recipe.model.trust_remote_code},
    }


def replay_directory(run: RunDirectory) -> Path:
    """What a run keeps of the preparation of `data.replay`."""
    return run.data / "replay"


def corpus_options(corpus: CorpusConfig | Corpus) -> dict[str, Any]:
    """What prepared data depends on in a corpus, as JSON values. Scores and documents are there where they are read alone;
    records of before there were any lack them."""
    options = asdict(corpus)
    for name in ("scores", "doc", "rejected"):
        if not options["columns"][name]:
            del options["columns"][name]
    return options


def set_directory(run: RunDirectory, name: str) -> Path:
    """What a run keeps of a test set's preparation."""
    return run.data / "sets" / name


def split_file(pair: str, split: str) -> str:
    """Name of the Arrow file of a split in a cache entry."""
    return f"{pair}.{split}.arrow"


def read_manifest(entry: Path) -> dict[str, Any]:
    """The manifest of a cache entry whose files are all there.

    Raises:
        ArtefactError: something is missing or has another size than when it was written.
    """
    manifest: dict[str, Any] = read_json(entry / "manifest.json", CURE)
    if manifest.get("format") != FORMAT:
        raise ArtefactError(f"{entry}: is not a {FORMAT} cache entry: {CURE}")
    for name, size in manifest["files"].items():
        file = inside(entry, name, entry / "manifest.json")
        if not file.is_file() or file.stat().st_size != size:
            raise ArtefactError(f"{file}: is missing or damaged: {CURE} with --force")
    return manifest
