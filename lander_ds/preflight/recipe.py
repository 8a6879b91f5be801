"""Everything that is refused before a stage begins: what the recipe says, then the files that it names."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from lander_ds.common.errors import ConfigError, LanderError, ModelError
from lander_ds.config.check import Check
from lander_ds.config.consistency import check_consistency
from lander_ds.config.data_consistency import evaluated_pairs
from lander_ds.config.document import Document, Problems
from lander_ds.config.loading import read_recipe
from lander_ds.config.recipe import Recipe
from lander_ds.config.schema.neural import NeuralConfig
from lander_ds.data.filters import check_filters
from lander_ds.data.tokens.prompt import check_prompt
from lander_ds.evaluation.metrics import check_tokenizers
from lander_ds.evaluation.neural import NeuralMetric
from lander_ds.models.hub import with_local_model
from lander_ds.preflight.files import STAGES_WITH_MODEL, check_files
from lander_ds.preflight.prompts import check_prompts
from lander_ds.training.trackers import KINDS, installed


def load_checked(path: Path, overrides: Sequence[str], stages: str | Collection[str] | None) -> Recipe:
    """Read a recipe that is sound for `stages`; see `check_recipe`. Its DeepSpeed JSON is another matter.

    Raises:
        ConfigError: one message with every problem found.
    """
    recipe, document = read_recipe(path, overrides)
    return check_recipe(recipe, stages, document)


def check_recipe(
    recipe: Recipe,
    stages: str | Collection[str] | None,
    document: Document | None = None,
    download: bool = True,
) -> Recipe:
    """Refuse what cannot work.

    Args:
        recipe: the recipe.
        stages: the stage or stages about to run, `all`, or None to check everything.
        document: where the recipe was read from, so that messages name lines.
        download: fetch a base model and neural metrics that are named by their hub ids, where the stages need them; what
            could be fetched is not missed otherwise.

    Returns:
        The recipe, with the model's directory in place of a hub id.

    Raises:
        ConfigError: one message with every problem found.
    """
    problems = Problems(document or Document("the recipe", None))
    check = Check(recipe, {stages} if isinstance(stages, str) else stages, problems)
    check_consistency(check)
    _check_texts(check)
    if check.stages is not None and check.runs("train"):
        _check_trackers(check)
    if check.stages is not None and check.runs("detect", "train"):
        _check_quantize(check)
    if check.runs("score"):
        _check_score_tokenizers(check)
    problems.refuse()
    # Files come last: a path is worth looking up, and a model worth fetching, once the recipe makes sense.
    check = _with_local_model(check, download)
    problems.refuse()
    check_files(check)
    if download and check.stages is not None:
        _check_neural(check)
    problems.refuse()
    check_prompts(check)
    problems.refuse()
    return check.recipe


def _with_local_model(check: Check, download: bool) -> Check:
    wanted = check.stages is not None and check.runs(*STAGES_WITH_MODEL)
    try:
        return replace(check, recipe=with_local_model(check.recipe, download and wanted))
    except ModelError as error:
        check.refuse("model.path", str(error))
        return check


def _check_texts(check: Check) -> None:
    """Filters and prompt, as the code that uses them judges them."""
    data = check.recipe.data
    try:
        check_filters(data.filters)
        check_prompt(data.prompt, evaluated_pairs(check.recipe))
    except ConfigError as error:
        key, _, message = str(error).partition(" ")
        check.refuse(key.rstrip(":"), message)


def _check_trackers(check: Check) -> None:
    for name in check.recipe.train.trackers:
        if name in KINDS and not installed(name):
            check.refuse(
                "train.trackers",
                f"{name} is not installed; pip install 'lander-ds[track]', or take it out",
            )


def _check_quantize(check: Check) -> None:
    if check.recipe.model.quantize is not None and not installed("bitsandbytes"):
        check.refuse(
            "model.quantize",
            f"{check.recipe.model.quantize} needs bitsandbytes, which is not installed; pip install "
            "'lander-ds[quantize]', or remove it",
        )


def _check_neural(check: Check) -> None:
    recipe = check.recipe
    wanted: list[tuple[str, str, NeuralConfig]] = [
        ("score.neural", name, config)
        for name, config in recipe.score.neural.items()
        if check.runs("score") or (check.runs("train") and name == recipe.train.keep_best)
    ]
    if check.runs("prepare"):
        quality = recipe.data.filters.quality
        wanted += [("data.filters.quality", name, config) for name, config in quality.items()]
    for section, name, config in wanted:
        own = f"{section}.{name}"
        try:
            NeuralMetric.resolve(name, config)
        except LanderError as error:
            key, _, message = str(error).partition(": ")
            check.refuse(*((key, message) if key.startswith(own) else (own, str(error))))


def _check_score_tokenizers(check: Check) -> None:
    score, pairs = check.recipe.score, evaluated_pairs(check.recipe)
    targets = {pair.partition("-")[2] for pair in pairs}
    for language, tokenizer in score.tokenizers.items():
        key = f"score.tokenizers.{language}"
        try:
            check_tokenizers({language: tokenizer})
        except ConfigError as error:
            check.refuse(key, str(error).removeprefix(f"{key}: "))
        if language not in targets:
            check.warn(key, f"no pair has the target language {language}")
