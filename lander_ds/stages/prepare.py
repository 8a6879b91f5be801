"""Stage prepare: corpora to checked, deduplicated, tokenised pairs."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from lander_ds.common.console import progress, stderr
from lander_ds.common.errors import ArtefactError, ConfigError, DataError
from lander_ds.common.files import file_hash, json_hash, write_json, writing
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.recipe import Recipe
from lander_ds.data.build import build, entry_hash
from lander_ds.data.filters import check_filters
from lander_ds.data.prepared import PreparedData, prepared_options
from lander_ds.data.sources.corpus import Corpus, resolve
from lander_ds.data.tokens.encoding import Encoder
from lander_ds.data.tokens.prompt import check_prompt
from lander_ds.data.tokens.tokenizer import load_tokenizer, tokenizer_fingerprint
from lander_ds.distributed import collectives, process_group

logger = logging.getLogger(__name__)

STAGE = "prepare"


def run(recipe: Recipe, run: RunDirectory, force: bool = False) -> None:
    """Read, filter and tokenise the corpora into a cache entry, and point the run at it.

    Rank 0 works, the others wait. Writes `data/prepared.json`, `data/statistics.json` and
    `data/rejected.jsonl`.

    Args:
        recipe: the recipe.
        run: its run directory.
        force: build again what is up to date.

    Raises:
        ConfigError: data options that cannot work.
        DataError: a corpus is missing or unfit.
        ModelError: the tokenizer is missing or unfit.
    """
    if process_group.rank() == 0:
        _run_on_one_rank(recipe, run, force)
    collectives.barrier()


def _run_on_one_rank(recipe: Recipe, run: RunDirectory, force: bool) -> None:
    started = time.monotonic()
    _check(recipe)
    corpora = resolve(recipe.data)
    tokenizer = load_tokenizer(recipe.model.path, recipe.model.trust_remote_code)
    contents = _content_hashes(corpora)
    options, fingerprint = prepared_options(recipe), tokenizer_fingerprint(tokenizer)
    inputs = contents | {"tokenizer": fingerprint}
    if not force and run.up_to_date(STAGE, options, inputs) and _usable(recipe, run):
        logger.info("prepare: up to date")
        return
    digest = entry_hash(recipe, corpora, contents, fingerprint)
    cache = Path(recipe.data.cache_dir).expanduser() if recipe.data.cache_dir else run.path / "cache"
    entry = cache / f"prepared-{digest[:20]}"
    with Encoder(
        tokenizer, recipe.model.path, recipe.model.trust_remote_code, recipe.data.workers
    ) as encoder:
        manifest = build(recipe, corpora, encoder, entry, digest, anew=force)
    statistics = manifest["statistics"]
    _log_statistics(statistics)
    run.data.mkdir(parents=True, exist_ok=True)
    _copy(entry / "rejected.jsonl", run.data / "rejected.jsonl")
    write_json(run.data / "statistics.json", statistics)
    # Relative where the cache lies in the run directory, so that the directory can be moved.
    inside = entry.resolve().is_relative_to(run.path.resolve())
    location = entry.resolve().relative_to(run.path.resolve()) if inside else entry.resolve()
    write_json(
        run.data / "prepared.json",
        {"entry": str(location), "hash": digest, "options_hash": json_hash(options)},
    )
    outputs = [run.data / name for name in ("prepared.json", "statistics.json", "rejected.jsonl")]
    run.record(STAGE, options, inputs, outputs, time.monotonic() - started, {"statistics": statistics})
    logger.info("prepare: data in %s, dropped lines in %s", entry, run.data / "rejected.jsonl")


def _check(recipe: Recipe) -> None:
    data = recipe.data
    check_filters(data.filters)
    check_prompt(data.prompt, data.pairs)
    for name, least in (("max_length", 2), ("detect_examples", 0), ("workers", 1)):
        if getattr(data, name) < least:
            raise ConfigError(f"data.{name}: {getattr(data, name)} is too small: use {least} or more")


def _usable(recipe: Recipe, run: RunDirectory) -> bool:
    try:
        PreparedData.load(run, recipe)
    except ArtefactError:
        return False
    return True


def _content_hashes(corpora: list[Corpus]) -> dict[str, str]:
    paths = list(dict.fromkeys(path for corpus in corpora for path in corpus.paths))
    hashes = {}
    with progress("prepare: hash corpora (files)", len(paths)) as bar:
        for path in paths:
            try:
                hashes[str(path)] = file_hash(path)
            except OSError as error:
                raise DataError(
                    f"{path}: cannot be read ({error}): check the file and its permissions"
                ) from None
            bar.advance(1, note=path.name)
    return hashes


def _copy(source: Path, target: Path) -> None:
    with writing(target) as temporary:
        shutil.copyfile(source, temporary)


def _log_statistics(statistics: dict[str, dict[str, dict[str, Any]]]) -> None:
    splits = [
        (pair, split, counts) for pair, of_pair in statistics.items() for split, counts in of_pair.items()
    ]
    reasons = sorted({reason for _, _, counts in splits for reason in counts["dropped"]})
    table = Table("pair", "split", title="Prepared data")
    for name in ("read", "kept", "tokens", *reasons):
        table.add_column(name, justify="right")
    for pair, split, counts in splits:
        dropped = [str(counts["dropped"].get(reason, 0)) for reason in reasons]
        table.add_row(pair, split, str(counts["read"]), str(counts["kept"]), str(counts["tokens"]), *dropped)
        if split == "test" and counts["dropped"]:
            logger.warning(
                "%d of %d test lines of %s were dropped: scores are for those that are left",
                sum(counts["dropped"].values()),
                counts["read"],
                pair,
            )
    stderr.print(table)
