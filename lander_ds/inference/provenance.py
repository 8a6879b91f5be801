"""What the translations of a system were made from, so that they are made again only when that changes.

Each system has its own stage record (`translate.base`, ...): training again does not make the untouched base
translate again.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers.utils import GENERATION_CONFIG_NAME

from lander_ds.checkpoint.checkpoint import Checkpoint
from lander_ds.checkpoint.choice import chosen
from lander_ds.common.errors import ArtefactError
from lander_ds.common.files import file_hash, json_hash
from lander_ds.config.recipe import Recipe
from lander_ds.config.schema.types import Split, System
from lander_ds.config.systems import model_of, shows_examples
from lander_ds.data.prepared import NamedSet, PreparedData
from lander_ds.data.tokens.prompt import prompt_options
from lander_ds.distributed.start import Start


def record_name(system: System, test_set: str | None = None) -> str:
    """Name of the stage record of a system's translations."""
    return f"translate.{system}" if test_set is None else f"translate.{system}.{test_set}"


def is_up_to_date(start: Start, data: PreparedData, system: System, test_set: NamedSet | None = None) -> bool:
    """Whether the system's translations are there and were made from this recipe, data, base and training.

    Raises:
        ArtefactError: the trained system is asked for and there is no checkpoint.
    """
    trained = (
        chosen(start.run.checkpoints, start.recipe.translate.checkpoint)
        if model_of(system) == "trained"
        else None
    )
    name = record_name(system, None if test_set is None else test_set.name)
    options = options_of(start.recipe, system, test_set)
    return start.run.up_to_date(name, options, inputs_of(start, data, system, trained, test_set))


def data_hash(start: Start) -> str | None:
    """Of the prepared data that a training reads; None where none fit the recipe."""
    try:
        return PreparedData.load(start.run, start.recipe).content_hash("train", "valid")
    except ArtefactError:
        return None


def options_of(recipe: Recipe, system: System, test_set: NamedSet | None = None) -> dict[str, Any]:
    """What in the recipe a system's translations depend on; batch size and sharding only change the speed."""
    wanted = ["limit"]
    if test_set is None:
        wanted.append("split")
    if shows_examples(system):
        wanted.append("shots")
    named = {name: getattr(recipe.translate, name) for name in wanted}
    depends = {"system": system, "dtype": recipe.model.dtype, **named, **decoding_options(recipe)}
    # Prompts with examples are rendered when they are wanted; the others are part of the prepared data.
    return depends | (
        {"prompt": prompt_options(recipe.data.prompt), "seed": recipe.data_seed}
        if shows_examples(system)
        else {}
    )


def decoding_options(recipe: Recipe) -> dict[str, Any]:
    """What in the recipe decides how the model's probabilities become translations."""
    options = asdict(recipe.decoding)
    names = ["beams", "length_penalty", "max_new_tokens"]
    if recipe.translate.sampling.temperature:
        names.append("sampling")
    return {name: options[name] for name in names}


def inputs_of(
    start: Start,
    data: PreparedData,
    system: System,
    trained: Checkpoint | None,
    test_set: NamedSet | None = None,
) -> dict[str, str]:
    """Hashes of what a system's translations are made from.

    Args:
        start: names the base.
        data: prepared data.
        system: its name.
        trained: the checkpoint of the trained model, for systems that are it.
        test_set: what is translated; None: the split `translate.split` of `data`.
    """
    shown: tuple[Split, ...] = ("train",) if shows_examples(system) else ()
    if test_set is None:
        inputs = {"data": data.content_hash(start.recipe.translate.split, *shown)}
    else:
        inputs = {"set": test_set.data.content_hash(test_set.split, *shown)}
        if shown:
            inputs["data"] = data.content_hash(*shown)
    inputs["base"] = start.base_fingerprint
    own = Path(start.recipe.model.path) / GENERATION_CONFIG_NAME
    if own.exists():
        inputs["generation config"] = file_hash(own)
    if model_of(system) == "trained" and trained is not None:
        inputs["checkpoint"] = json_hash(dict(trained.state))
    return inputs
