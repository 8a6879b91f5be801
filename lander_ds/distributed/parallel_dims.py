"""Which rank does what: pipeline stages times data-parallel ranks, and the engine of a recipe's topology."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from lander_ds.common.errors import ConfigError
from lander_ds.config.recipe import Recipe
from lander_ds.distributed import process_group
from lander_ds.distributed.balance import costs_of, cut, stage_costs
from lander_ds.distributed.engines.engine import Engine, MakeModel, MakeOptimizer
from lander_ds.models.family import Family
from lander_ds.models.span import Span, spans

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ParallelDims:
    """The ranks as a grid: ranks of one pipeline stage lie side by side."""

    stages: int
    """Pipeline stages; 1 without a pipeline."""
    data_ranks: int
    """Data-parallel ranks: how many parts a global batch is divided into."""
    rank: int
    """This global rank."""

    @property
    def stage(self) -> int:
        """This rank's pipeline stage."""
        return self.rank // self.data_ranks

    @property
    def data_rank(self) -> int:
        """This rank's part of a global batch."""
        return self.rank % self.data_ranks


def layout(recipe: Recipe) -> ParallelDims:
    """The grid of this world.

    Raises:
        ConfigError: the ranks cannot be divided over the pipeline stages.
    """
    ranks, stages = process_group.world_size(), recipe.pipeline_stages
    if ranks % stages:
        raise ConfigError(
            f"pipeline_stages: {stages} does not divide the {ranks} ranks that were started: start a multiple of "
            f"{stages} ranks, or change pipeline_stages"
        )
    return ParallelDims(stages, ranks // stages, process_group.rank())


def span_of(
    recipe: Recipe, model: PreTrainedModel, family: Family, grid: ParallelDims, everything: bool = False
) -> Span:
    """The part of the model that this rank's stage computes: as `pipeline_cut` says, or balanced by compute.

    Args:
        recipe: topology and cut.
        model: after surgery, trained parameters marked; may be on meta.
        family: its family.
        grid: of this world.
        everything: gradients go down to the embedding although nothing is trained (detection).
    """
    layers = family.layers_of(model)
    if grid.stages == 1:
        return Span(0, len(layers), len(layers))
    costs, of_head = costs_of(
        layers, model.get_output_embeddings().weight, recipe.train.activation_checkpointing, everything
    )
    begins = recipe.pipeline_cut or cut(costs, of_head, grid.stages)
    found = spans(begins, len(layers))
    shares = stage_costs(costs, of_head, begins)
    for stage, (span, share) in enumerate(zip(found, shares, strict=True)):
        logger.info(
            "pipeline stage %d: decoder layers %d to %d, %.0f %% of the compute of the slowest stage",
            stage,
            span.start,
            span.stop - 1,
            100.0 * share / max(shares),
        )
    return found[grid.stage]


def reads_weights(recipe: Recipe, grid: ParallelDims) -> bool:
    """Whether this rank reads weights from disk: where ZeRO-3 shards them, one rank of a stage reads and hands them out."""
    return recipe.topology == "pipeline" or grid.data_rank == 0


def open_engine(
    recipe: Recipe, config: dict[str, Any], make_model: MakeModel, make_optimizer: MakeOptimizer
) -> Engine:
    """The engine of the recipe's topology (collective).

    Args:
        recipe: names the topology.
        config: resolved DeepSpeed configuration.
        make_model: builds this rank's span of the model.
        make_optimizer: makes the optimizer of it, once it is built.

    Raises:
        ConfigError: the installed DeepSpeed does not fit.
    """
    # Lazily: the pipelines import parts of DeepSpeed that zero3 does not need.
    if recipe.topology == "zero3":
        from lander_ds.distributed.engines.zero3 import Zero3

        return Zero3(config, make_model, make_optimizer)
    if recipe.topology == "pipeline":
        from lander_ds.distributed.engines.pipeline import Pipeline

        return Pipeline(config, recipe.pipeline_stages, make_model, make_optimizer)
    from lander_ds.distributed.engines.pipeline_zero3 import PipelineZero3, check_deepspeed

    check_deepspeed()
    return PipelineZero3(config, recipe.pipeline_stages, make_model, make_optimizer)
