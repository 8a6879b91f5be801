"""`lander candidates`."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence

from lander_ds.cli.arguments import check_output
from lander_ds.common.errors import ConfigError, DataError
from lander_ds.common.files import write_text
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.document import nearest
from lander_ds.config.recipe import Recipe
from lander_ds.evaluation.candidates import SentenceScores, chrf, preferences, read_candidates
from lander_ds.evaluation.neural import NeuralMetric
from lander_ds.evaluation.neural_scores import Segment, neural_scores
from lander_ds.preflight.recipe import load_checked

logger = logging.getLogger(__name__)


def run(arguments: argparse.Namespace) -> None:
    """Write preferences."""
    check_output(arguments.output)
    score = _metric(arguments)
    candidates = read_candidates(arguments.input, arguments.reference)
    lines = [
        json.dumps(row, ensure_ascii=False) + "\n"
        for row in preferences(candidates, score, arguments.chosen, arguments.margin)
    ]
    if not lines:
        raise DataError(
            f"{arguments.input}: no source has a better and a worse translation: give more of them (--n-best, or "
            "sampling), or lower --margin"
        )
    write_text(arguments.output, "".join(lines))
    logger.info("%d of %d sources have a preference: %s", len(lines), len(candidates), arguments.output)


def _metric(arguments: argparse.Namespace) -> SentenceScores:
    name = arguments.metric
    if name == "chrf":
        return chrf
    if arguments.recipe is None:
        raise ConfigError(
            f"--metric {name}: name the recipe whose score.neural has it with --recipe, or use chrf"
        )
    recipe: Recipe = load_checked(arguments.recipe, arguments.overrides, "score")
    if name not in recipe.score.neural:
        near = nearest(name, recipe.score.neural)
        hint = f"did you mean {near}?" if near else f"it has {', '.join(recipe.score.neural) or 'none'}"
        raise ConfigError(f"--metric {name}: score.neural of the recipe has no such metric; {hint}")
    metric = NeuralMetric.resolve(name, recipe.score.neural[name])
    cache = RunDirectory(recipe.run_dir).cache(recipe.data.cache_dir)

    def score(segments: Sequence[Segment]) -> list[float]:
        of = neural_scores(metric, segments, cache).of
        return [of[segment] for segment in segments]

    return score
