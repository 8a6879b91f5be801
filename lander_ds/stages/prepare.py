"""Stage prepare: corpora to checked, deduplicated, tokenised pairs."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, get_args

from rich.table import Table
from transformers import PreTrainedTokenizerBase

from lander_ds.common.console import progress, stderr
from lander_ds.common.errors import ArtefactError, ConfigError, DataError, ModelError
from lander_ds.common.files import file_hash, json_hash, write_json, writing
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.data_consistency import evaluated_pairs
from lander_ds.config.recipe import Recipe
from lander_ds.config.schema.neural import QualityConfig
from lander_ds.config.schema.types import Split
from lander_ds.data.build import TrainedOn, build, entry_hash
from lander_ds.data.filters import check_filters
from lander_ds.data.prepared import (
    STATISTICS,
    PreparedData,
    prepared_options,
    replay_directory,
    replay_options,
    set_directory,
    set_options,
)
from lander_ds.data.quality import Judge
from lander_ds.data.replay import build_replay, kept_apart, replay_hash
from lander_ds.data.sets import TRAINED, set_recipe, what_was_trained_on
from lander_ds.data.sources.corpus import Corpus, resolve, resolve_replay, resolve_set
from lander_ds.data.sources.rows import Row
from lander_ds.data.sources.sacrebleu_sets import origin
from lander_ds.data.tokens.encoding import Encoder
from lander_ds.data.tokens.prompt import check_prompt
from lander_ds.data.tokens.tokenizer import embedding_rows, load_tokenizer, tokenizer_fingerprint
from lander_ds.distributed.start import Start
from lander_ds.evaluation.neural import NeuralMetric
from lander_ds.evaluation.neural_scores import Segment, scorer
from lander_ds.stages.stage import Part, Result, Stage

logger = logging.getLogger(__name__)


def _parts(start: Start) -> list[Part]:
    """The corpora read, filtered and tokenised into a cache entry, and the run pointed at it; then a part for the texts of
    `data.replay` and one per test set of `evaluate.sets`, which are other entries.

    Writes `data/prepared.json`, `data/statistics.json` and `data/rejected.jsonl`, and the same in `data/replay` and
    `data/sets/NAME`.

    Raises:
        ConfigError: data options that cannot work; the program of a metric that filters is missing.
        DataError: a corpus is missing or unfit.
        ModelError: the tokenizer is missing or unfit, or gives ids that the model does not know.
    """
    recipe, run = start.recipe, start.run
    _check(recipe)
    corpora = resolve(recipe.data)
    tokenizer = load_tokenizer(recipe.model.path, recipe.model.trust_remote_code)
    known: dict[str, str] = {}
    contents = _content_hashes(corpora, known)
    fingerprint = tokenizer_fingerprint(tokenizer, recipe.data.prompt.chat)
    metrics = [NeuralMetric.resolve(name, config) for name, config in recipe.data.filters.quality.items()]
    identities = {metric.name: metric.identity for metric in metrics}
    inputs = contents | {"tokenizer": fingerprint} | {metric.key: metric.identity for metric in metrics}

    def make(digest: str, fill: Callable[[Encoder, Path], dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
        """The cache entry of that name, filled, and its manifest."""
        entry = run.cache(recipe.data.cache_dir) / f"prepared-{digest[:20]}"
        with Encoder(
            tokenizer, recipe.model.path, recipe.model.trust_remote_code, recipe.data.workers
        ) as encoder:
            manifest = fill(encoder, entry)
        _check_ids(PreparedData(entry), Path(recipe.model.path), tokenizer)
        return entry, manifest

    def prepare() -> Result:
        digest = entry_hash(recipe, corpora, contents, fingerprint, identities)
        with ExitStack() as stack:
            judges = [_judge(metric, run.cache(recipe.data.cache_dir), stack) for metric in metrics]
            prepared = make(
                digest,
                lambda encoder, entry: build(
                    recipe, corpora, encoder, entry, digest, start.force, judges=judges
                ),
            )
        return _finished(*prepared, run, run.data, options, "Prepared data")

    def replay() -> Part:
        texts, apart = resolve_replay(recipe.data), kept_apart(recipe, corpora)
        hashes = _content_hashes([*texts, *apart], known)

        def prepare_replay() -> Result:
            digest = replay_hash(recipe, texts, apart, hashes, fingerprint)
            prepared = make(
                digest,
                lambda encoder, entry: build_replay(
                    recipe, texts, apart, encoder, entry, digest, start.force
                ),
            )
            return _finished(
                *prepared, run, replay_directory(run), replay_options(recipe), "Texts for replay"
            )

        return Part(
            "prepare_replay",
            replay_options(recipe),
            hashes | {"tokenizer": fingerprint},
            prepare_replay,
            usable=lambda: _usable(lambda: PreparedData.load_replay(run, recipe)),
        )

    @cache
    def trained_on() -> TrainedOn:
        return what_was_trained_on(recipe, corpora, PreparedData.load(run, recipe))

    def part(name: str) -> Part:
        own = resolve_set(recipe, name)
        of_set, hashes = set_recipe(recipe, name), _content_hashes(own, known)

        def prepare_set() -> Result:
            for key, text in (origin(recipe.evaluate.sets[name]) or {}).items():
                logger.info("prepare: test set %s: %s: %s", name, key, " ".join(text.split()))
            training = PreparedData.load(run, recipe).content_hash(*TRAINED)
            digest = json_hash([entry_hash(of_set, own, hashes, fingerprint), training])
            prepared = make(
                digest,
                lambda encoder, entry: build(of_set, own, encoder, entry, digest, start.force, trained_on),
            )
            directory, title = set_directory(run, name), f"Test set {name}"
            return _finished(*prepared, run, directory, set_options(recipe, name), title)

        return Part(
            f"prepare.{name}",
            set_options(recipe, name),
            inputs | hashes,
            prepare_set,
            usable=lambda: _usable(lambda: PreparedData.load_set(run, recipe, name)),
        )

    options = prepared_options(recipe)
    whole = Part(
        "prepare",
        options,
        inputs,
        prepare,
        usable=lambda: _usable(lambda: PreparedData.load(run, recipe)),
    )
    texts = [replay()] if recipe.data.replay.corpora else []
    return [whole, *texts, *(part(name) for name in recipe.evaluate.sets)]


STAGE = Stage("prepare", _parts)
run = STAGE.run


def _judge(metric: NeuralMetric, cache: Path, stack: ExitStack) -> Judge:
    """The filter of a metric, whose process ends with `stack`."""
    assert isinstance(metric.config, QualityConfig)
    score = stack.enter_context(scorer(metric, cache))

    def scores(rows: Sequence[Row]) -> list[float]:
        segments = [Segment(row.src, row.tgt, "") for row in rows]
        of = score(segments)
        return [of[segment] for segment in segments]

    return Judge(metric.name, metric.config.min, scores)


def _check_ids(data: PreparedData, model: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse tokens that were added to the tokenizer and not to the model, where the data hold any.

    Raises:
        ModelError: naming the token.
    """
    rows = embedding_rows(model)
    for name in get_args(Split) if rows is not None else ():
        for pair, split in data.split(name).items():
            if rows is not None and (largest := split.largest_id()) >= rows:
                raise ModelError(
                    f"{model}: the {name} data of {pair} hold the token {tokenizer.convert_ids_to_tokens(largest)!r} with "
                    f"id {largest}, but the model's embedding has {rows} rows (vocab_size in config.json): the token "
                    "was added to the tokenizer alone; call model.resize_token_embeddings and save the model, or take "
                    "the token out of the tokenizer"
                )


def _finished(
    entry: Path,
    manifest: Mapping[str, Any],
    run: RunDirectory,
    directory: Path,
    options: Mapping[str, Any],
    title: str,
) -> Result:
    """Have the run use a cache entry, and say what is in it.

    Args:
        entry: the cache entry.
        manifest: what is in it.
        run: the run.
        directory: where the files lie that point at it.
        options: everything in the recipe that it depends on.
        title: of the table.
    """
    statistics = manifest["statistics"]
    directory.mkdir(parents=True, exist_ok=True)
    outputs = [directory / name for name in ("prepared.json", STATISTICS, "rejected.jsonl")]
    pointer, counts, rejected = outputs
    _log_statistics(statistics, title, rejected)
    _copy(entry / rejected.name, rejected)
    write_json(counts, statistics)
    # Relative where the cache lies in the run directory, so that the directory can be moved.
    inside = entry.resolve().is_relative_to(run.path.resolve())
    location = entry.resolve().relative_to(run.path.resolve()) if inside else entry.resolve()
    hashes = {"hash": manifest["hash"], "options_hash": json_hash(options)}
    write_json(pointer, {"entry": str(location), **hashes})
    logger.info("prepare: data in %s, dropped lines in %s", entry, rejected)
    return Result(outputs, {"statistics": statistics})


def _check(recipe: Recipe) -> None:
    data = recipe.data
    check_filters(data.filters)
    check_prompt(data.prompt, evaluated_pairs(recipe))
    for name, least in (("max_length", 2), ("detect_examples", 0), ("workers", 1)):
        if getattr(data, name) < least:
            raise ConfigError(f"data.{name}: {getattr(data, name)} is too small: use {least} or more")


def _usable(load: Callable[[], PreparedData | None]) -> bool:
    try:
        load()
    except ArtefactError:
        return False
    return True


def _content_hashes(corpora: list[Corpus], known: dict[str, str]) -> dict[str, str]:
    """Content hash of every path in `corpora`.

    Args:
        corpora: what is read.
        known: hashes by path, so that no file is read twice; new ones are added.
    """
    paths = list(dict.fromkeys(path for corpus in corpora for path in corpus.paths))
    new = [path for path in paths if str(path) not in known]
    with progress("prepare: hash corpora (files)", len(new)) as bar:
        for path in new:
            try:
                known[str(path)] = file_hash(path)
            except OSError as error:
                raise DataError(
                    f"{path}: cannot be read ({error}): check the file and its permissions"
                ) from None
            bar.advance(1, note=path.name)
    return {str(path): known[str(path)] for path in paths}


def _copy(source: Path, target: Path) -> None:
    with writing(target) as temporary:
        shutil.copyfile(source, temporary)


def _log_statistics(statistics: dict[str, dict[str, dict[str, Any]]], title: str, rejected: Path) -> None:
    splits = [
        (pair, split, counts) for pair, of_pair in statistics.items() for split, counts in of_pair.items()
    ]
    reasons = sorted({reason for _, _, counts in splits for reason in counts["dropped"]})
    table = Table("pair", "split", title=title)
    for name in ("read", "kept", "tokens", *reasons):
        table.add_column(name, justify="right")
    for pair, split, counts in splits:
        dropped = [str(counts["dropped"].get(reason, 0)) for reason in reasons]
        table.add_row(pair, split, str(counts["read"]), str(counts["kept"]), str(counts["tokens"]), *dropped)
        lost = sum(counts["dropped"].values())
        if 2 * lost > counts["read"]:
            reason, most = max(counts["dropped"].items(), key=lambda item: item[1])
            logger.warning(
                "%d of %d %s lines of %s were dropped, most of them (%d) as %s: see %s; relax "
                "data.filters or data.max_length, or correct the corpus",
                *(lost, counts["read"], split, pair, most, reason, rejected),
            )
        if split == "test" and counts["dropped"]:
            logger.warning(
                "%d of %d test lines of %s were dropped: scores are for those that are left",
                lost,
                counts["read"],
                pair,
            )
    stderr.print(table)
