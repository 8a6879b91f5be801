"""Which rank does what: pipeline stages times data-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass

from lander_ds.common.errors import ConfigError
from lander_ds.config.recipe import Recipe
from lander_ds.distributed import process_group


@dataclass(frozen=True)
class ParallelDims:
    """The ranks as a grid: ranks of one pipeline stage lie side by side."""

    pipeline_stages: int
    """1 without a pipeline."""
    data_parallel_ranks: int
    """How many parts a global batch is divided into."""
    rank: int
    """This global rank."""

    @property
    def pipeline_stage(self) -> int:
        """This rank's."""
        return self.rank // self.data_parallel_ranks

    @property
    def data_parallel_rank(self) -> int:
        """This rank's part of a global batch."""
        return self.rank % self.data_parallel_ranks


def parallel_dims(recipe: Recipe) -> ParallelDims:
    """The grid of this world.

    Raises:
        ConfigError: the ranks cannot be divided over the pipeline stages.
    """
    ranks, pipeline_stages = process_group.world_size(), recipe.pipeline_stages
    if ranks % pipeline_stages:
        raise ConfigError(
            f"pipeline_stages: {pipeline_stages} does not divide the {ranks} ranks that were started: start a multiple "
            f"of {pipeline_stages} ranks, or change pipeline_stages"
        )
    return ParallelDims(pipeline_stages, ranks // pipeline_stages, process_group.rank())
