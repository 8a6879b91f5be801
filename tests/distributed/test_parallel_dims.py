"""Which rank does what, and what is refused before anything starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.checkpoints import recipe_for, selection_for
from support.tiny_models import save, tiny_model

from lander_ds.common.errors import ConfigError
from lander_ds.config.recipe import Recipe
from lander_ds.distributed.balance import span_of
from lander_ds.distributed.parallel_dims import ParallelDims, parallel_dims
from lander_ds.models.loading import build
from lander_ds.models.parameter_groups import mark_trained, prepare_model
from lander_ds.models.span import Span


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    base = recipe_for(save(tiny_model("llama"), tmp_path / "base"), tmp_path / "run")
    return replace(base, topology="pipeline", pipeline_stages=2)


def test_ranks_of_a_pipeline_stage_lie_side_by_side() -> None:
    every = [ParallelDims(pipeline_stages=3, data_parallel_ranks=2, rank=rank) for rank in range(6)]
    assert [dims.pipeline_stage for dims in every] == [0, 0, 1, 1, 2, 2]
    assert [dims.data_parallel_rank for dims in every] == [0, 1, 0, 1, 0, 1]


def test_ranks_that_do_not_fill_the_pipeline_stages_are_refused(recipe: Recipe) -> None:
    with pytest.raises(
        ConfigError, match=r"pipeline_stages: 2 does not divide the 1 ranks.*start a multiple"
    ):
        parallel_dims(recipe)
    assert parallel_dims(replace(recipe, topology="zero3", pipeline_stages=1)) == ParallelDims(1, 1, 0)


@pytest.mark.parametrize(
    ("cut", "everything", "expected"),
    [
        # Layer 1 of 3 is frozen between two that train, and nothing is below the first.
        ((), False, ((0, 2), (2, 3))),
        ((), True, ((0, 2), (2, 3))),
        ((1,), False, ((0, 1), (1, 3))),
        ((1,), True, ((0, 1), (1, 3))),
    ],
)
def test_every_pipeline_stage_gets_its_layers(
    recipe: Recipe, cut: tuple[int, ...], everything: bool, expected: tuple[tuple[int, int], ...]
) -> None:
    recipe, selection = replace(recipe, pipeline_cut=cut), selection_for(recipe)
    model, family = build(recipe.model)
    if everything:
        model.requires_grad_(False)
    else:
        prepare_model(model, family, recipe, selection)
        mark_trained(model, family, recipe.train, selection)
    for rank, (start, stop) in enumerate(expected):
        assert span_of(recipe, model, family, ParallelDims(2, 1, rank), everything) == Span(start, stop, 3)
