"""The systems that translate: which model each is, and whether its prompts show examples."""

from __future__ import annotations

from typing import Literal

from lander_ds.config.recipe import Recipe
from lander_ds.config.schema.types import System


def model_of(system: System) -> Literal["base", "trained"]:
    """The model that a system is."""
    return "trained" if system in ("trained", "trained_fewshot") else "base"


def shows_examples(system: System) -> bool:
    """Whether its prompts begin with `translate.shots` examples, instead of being those of the training format."""
    return system in ("fewshot", "trained_fewshot")


def set_systems(recipe: Recipe) -> tuple[System, ...]:
    """The systems that translate the named test sets."""
    return recipe.translate.systems if recipe.evaluate.systems is None else recipe.evaluate.systems


def used_systems(recipe: Recipe) -> tuple[System, ...]:
    """Every system that translates anything, once."""
    of_sets = set_systems(recipe) if recipe.evaluate.sets else ()
    return tuple(dict.fromkeys((*recipe.translate.systems, *of_sets)))
