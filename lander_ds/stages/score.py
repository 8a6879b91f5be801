"""Stage score: translations -> scores.json and a table."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lander_ds.common.console import progress, stdout
from lander_ds.common.errors import ArtefactError
from lander_ds.common.files import file_hash, read_json, write_json
from lander_ds.config.data_consistency import (
    evaluated_pairs,
    has_examples,
    set_pairs,
    translated_pairs,
)
from lander_ds.config.loading import section
from lander_ds.config.recipe import Recipe
from lander_ds.config.schema.types import System
from lander_ds.config.systems import set_systems, shows_examples
from lander_ds.data.prepared import NamedSet, PreparedData
from lander_ds.data.sources.sacrebleu_sets import origin
from lander_ds.data.tokens.languages import split_pair
from lander_ds.distributed.start import Start
from lander_ds.evaluation.baseline import baseline_path, read_baseline
from lander_ds.evaluation.language import LanguageIdentifier
from lander_ds.evaluation.metrics import check_tokenizers
from lander_ds.evaluation.neural import NeuralMetric
from lander_ds.evaluation.neural_scores import NeuralScores, neural_scores
from lander_ds.evaluation.score import GIVEN, aligned, baseline_of, means, score_pair
from lander_ds.evaluation.sets import score_set
from lander_ds.inference.losses import LOSSES, TextLoss, read_losses
from lander_ds.inference.provenance import is_up_to_date, record_name
from lander_ds.inference.translations import Translation, read_translations
from lander_ds.report.sets import set_tables
from lander_ds.report.summary import pair_scores, remarks, score_tables
from lander_ds.stages.stage import Part, Result, Stage

logger = logging.getLogger(__name__)


def _parts(start: Start) -> list[Part]:
    """One part: scores of every system of `translate.systems`, and that of `score.baseline`, on every translated pair; and
    of every system of `evaluate.systems` on every named test set.

    Raises:
        ArtefactError: translations are missing, were made from something else, or do not fit together.
        ConfigError: `score.tokenizers` names a tokenizer that cannot be used; the program of a neural metric is missing.
        DataError: the file of `score.baseline` is missing or does not fit the translations.
        ModelError: the model of a neural metric is missing.
    """
    recipe, run = start.recipe, start.run
    check_tokenizers(recipe.score.tokenizers)
    metrics = [NeuralMetric.resolve(name, config) for name, config in recipe.score.neural.items()]
    systems, pairs = recipe.translate.systems, translated_pairs(recipe)
    paths: dict[str, dict[str, Path]] = {
        pair: {system: run.translations / system / f"{pair}.jsonl" for system in systems} for pair in pairs
    }
    translations: dict[str, dict[str, list[Translation]]] = {
        pair: {system: read_translations(path) for system, path in of_pair.items()}
        for pair, of_pair in paths.items()
    }
    for system in systems:
        _check_origin(start, system)
    if (pattern := recipe.score.baseline) is not None:
        for pair in pairs:
            paths[pair][GIVEN] = path = baseline_path(pattern, pair)
            translations[pair][GIVEN] = read_baseline(path, translations[pair][systems[0]])

    sets = [_OfSet(start, name) for name in recipe.evaluate.sets]

    def score() -> Result:
        tests = (translations, *(one.translations for one in sets))
        segments = [
            segment
            for of_pairs in tests
            for pair, of_pair in of_pairs.items()
            for of_system in aligned(pair, of_pair).values()
            for segment in of_system
        ]
        cache = run.cache(recipe.data.cache_dir)
        neural = {metric.name: neural_scores(metric, segments, cache) for metric in metrics}
        scores = _scores(recipe, translations, neural)
        if sets:
            scores["sets"] = _set_scores(recipe, sets, neural)
        write_json(run.scores, scores)
        return Result([run.scores])

    def show() -> None:
        scores = read_json(run.scores, "run stage score again")
        figures = pair_scores(scores)
        neural = scores.get("neural", [])
        for table in score_tables(figures, neural):
            stdout.print(table)
        for line in remarks(figures):
            logger.warning(line)
        for table in set_tables(scores.get("sets", {}), neural):
            stdout.print(table)

    options = {**section(recipe, "score", "seed"), "systems": list(systems), "pairs": list(pairs)}
    # A neural metric is what it reads and computes, not where it lies and runs.
    del options["score"]["neural"]
    if sets:
        # What is trained decides which means a direction belongs to.
        options |= {"sets": [one.name for one in sets], "trained": list(recipe.data.pairs)}
        if recipe.evaluate.systems is not None:
            options["set_systems"] = list(recipe.evaluate.systems)
    read = [path for of_pair in paths.values() for path in of_pair.values()]
    read += [path for one in sets for path in one.paths]
    inputs = {run.relative(path): file_hash(path) for path in read}
    inputs |= {f"score.neural.{metric.name}": metric.identity for metric in metrics}
    return [Part("score", options, inputs, score, show=show)]


STAGE = Stage("score", _parts)
run = STAGE.run


def _scores(
    recipe: Recipe,
    translations: Mapping[str, Mapping[str, list[Translation]]],
    neural: Mapping[str, NeuralScores],
) -> dict[str, Any]:
    """The content of scores.json, from the translations by pair and system."""
    pairs = list(translations)
    identifier = LanguageIdentifier({code for pair in recipe.data.pairs for code in split_pair(pair)})
    scored, signatures = {}, {}
    with progress("score", len(pairs)) as bar:
        for pair in pairs:
            scored[pair], signatures[pair] = score_pair(
                pair, translations[pair], recipe.score, recipe.seed, identifier, neural
            )
            bar.advance(1, pair)
    systems = list(scored[pairs[0]]["systems"])
    return {
        "baseline": baseline_of(systems),
        "baseline_file": recipe.score.baseline,
        "systems": systems,
        "bootstrap_samples": recipe.score.bootstrap_samples,
        **({"neural": list(neural)} if neural else {}),
        "pairs": scored,
        "mean": means(scored, neural),
        "signatures": signatures,
    }


class _OfSet:
    """What was translated of a named test set.

    Raises:
        ArtefactError: translations or losses are missing, or were made from something else.
    """

    def __init__(self, start: Start, name: str) -> None:
        recipe, run = start.recipe, start.run
        self.name = name
        self.paths: list[Path] = []
        """Files that were read."""
        self.translations: dict[str, dict[str, list[Translation]]] = {}
        """By direction and system."""
        self.losses: dict[str, dict[str, TextLoss]] = {}
        """By system and language."""
        for system in set_systems(recipe):
            directory = run.translations_of(system, name)
            for pair in set_pairs(recipe, name):
                # Examples for the prompt are not there for every direction.
                if not shows_examples(system) or has_examples(recipe, pair):
                    path = directory / f"{pair}.jsonl"
                    self.translations.setdefault(pair, {})[system] = read_translations(path)
                    self.paths.append(path)
            if not shows_examples(system):
                self.losses[system] = read_losses(directory / LOSSES)
                self.paths.append(directory / LOSSES)
            _check_origin(start, system, name)


def _set_scores(recipe: Recipe, sets: Sequence[_OfSet], neural: Mapping[str, NeuralScores]) -> dict[str, Any]:
    """`sets` of scores.json."""
    identifier = LanguageIdentifier({code for pair in evaluated_pairs(recipe) for code in split_pair(pair)})
    scored = {}
    with progress("score test sets", len(sets)) as bar:
        for one in sets:
            scored[one.name] = score_set(
                one.translations,
                one.losses,
                recipe.data.pairs,
                recipe.score,
                recipe.seed,
                identifier,
                neural,
            )
            if (said := origin(recipe.evaluate.sets[one.name])) is not None:
                scored[one.name]["origin"] = said
            bar.advance(1, one.name)
    return scored


def _check_origin(start: Start, system: System, name: str | None = None) -> None:
    # Translations without a record were put there by hand, which is fine; a record must fit.
    run = start.run
    if run.record_path(record_name(system, name)).exists():
        data = PreparedData.load(run, start.recipe)
        test_set = None if name is None else NamedSet.load(run, start.recipe, name)
        if not is_up_to_date(start, data, system, test_set):
            raise ArtefactError(
                f"{run.translations_of(system, name)} was translated with other options, data or training than this "
                "recipe's: run stage translate (again)"
            )
