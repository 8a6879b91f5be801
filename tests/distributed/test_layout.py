"""Which rank does what, and what is refused before anything starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import deepspeed
import pytest
from support.checkpoints import recipe_for, selection_for
from support.tiny_models import save, tiny_model

from lander_ds.common.errors import ConfigError
from lander_ds.config.recipe import Recipe
from lander_ds.distributed.engines import pipeline_zero3
from lander_ds.distributed.parallel_dims import ParallelDims, layout, span_of
from lander_ds.models.loading import build
from lander_ds.models.parameter_groups import mark_trained, prepare_model
from lander_ds.models.span import Span


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    base = recipe_for(save(tiny_model("llama"), tmp_path / "base"), tmp_path / "run")
    return replace(base, topology="pipeline", pipeline_stages=2)


def test_ranks_of_a_stage_lie_side_by_side() -> None:
    grids = [ParallelDims(stages=3, data_ranks=2, rank=rank) for rank in range(6)]
    assert [grid.stage for grid in grids] == [0, 0, 1, 1, 2, 2]
    assert [grid.data_rank for grid in grids] == [0, 1, 0, 1, 0, 1]


def test_ranks_that_do_not_fill_the_stages_are_refused(recipe: Recipe) -> None:
    with pytest.raises(
        ConfigError, match=r"pipeline_stages: 2 does not divide the 1 ranks.*start a multiple"
    ):
        layout(recipe)
    assert layout(replace(recipe, topology="zero3", pipeline_stages=1)) == ParallelDims(1, 1, 0)


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
def test_every_stage_gets_its_layers(
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


def test_the_installed_deepspeed_fits() -> None:
    pipeline_zero3.check_deepspeed()


def test_another_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_zero3, "version", lambda _: "0.20.1")
    with pytest.raises(ConfigError, match=r"DeepSpeed 0\.20\.1 was never tested with it.*requirements\.txt"):
        pipeline_zero3.check_deepspeed()


def _own(owner: object, name: str) -> bool:
    """Whether it would be missing without this definition: some are inherited too."""
    return not any(hasattr(base, name) for base in getattr(owner, "__mro__", ())[1:])


@pytest.mark.parametrize(("owner", "name"), [entry for entry in pipeline_zero3._RELIED_ON if _own(*entry)])
def test_a_deepspeed_in_which_something_moved_is_refused(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str
) -> None:
    monkeypatch.delattr(owner, name)
    with pytest.raises(ConfigError, match=rf"lacks \S*{name}.*topology: pipeline or zero3"):
        pipeline_zero3.check_deepspeed()


def test_the_patched_function_is_deepspeeds_own_outside_a_run() -> None:
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator

    assert coordinator.assert_ints_same_as_other_ranks is pipeline_zero3._COMPARE_ALL
    assert coordinator.assert_ints_same_as_other_ranks.__module__.startswith(deepspeed.__name__)
