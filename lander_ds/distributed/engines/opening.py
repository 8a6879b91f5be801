"""From a recipe's topology to its engine."""

from __future__ import annotations

from typing import Any

from lander_ds.config.recipe import Recipe
from lander_ds.distributed.engines.engine import Engine
from lander_ds.distributed.engines.pipeline import Pipeline
from lander_ds.distributed.engines.pipeline_zero3 import PipelineZero3
from lander_ds.distributed.engines.zero3 import Zero3


def open_engine(recipe: Recipe, config: dict[str, Any]) -> Engine:
    """The engine of the recipe's topology, without a model yet (collective).

    Args:
        recipe: names the topology.
        config: resolved DeepSpeed configuration.

    Raises:
        ConfigError: the installed DeepSpeed does not fit.
    """
    if recipe.topology == "zero3":
        return Zero3(config)
    pipeline = Pipeline if recipe.topology == "pipeline" else PipelineZero3
    return pipeline(config, recipe.pipeline_stages)
