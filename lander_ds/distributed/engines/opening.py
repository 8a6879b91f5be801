"""From a recipe's topology to its engine."""

from __future__ import annotations

from typing import Any

from lander_ds.config.recipe import Recipe
from lander_ds.distributed.engines.engine import Engine
from lander_ds.distributed.engines.pipeline import Pipeline
from lander_ds.distributed.engines.pipeline_zero3 import PipelineZero3
from lander_ds.distributed.engines.replicated import Replicated
from lander_ds.distributed.engines.zero3 import Zero3


def open_engine(recipe: Recipe, config: dict[str, Any]) -> Engine:
    """The engine of the recipe's topology, without a model yet (collective).

    Args:
        recipe: names the topology.
        config: resolved DeepSpeed configuration.

    Raises:
        ConfigError: the installed DeepSpeed does not fit.
    """
    match recipe.topology:
        case "zero3":
            return Zero3(config, recipe.frozen_shards)
        case "replicated":
            return Replicated(config)
        case "pipeline":
            return Pipeline(config, recipe.pipeline_stages)
        case "pipeline_zero3":
            return PipelineZero3(config, recipe.pipeline_stages, recipe.frozen_shards)
