"""The balanced cut against every cut there is, and the cost model against what is computed."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lander_ds.distributed.balance import cut, head_cost, layer_costs, pipeline_stage_costs


def balanced_cut(
    parameters: list[int],
    trained: list[int],
    head: int,
    head_trained: bool,
    stages: int,
    target_share: float = 0.5,
    recompute: bool = False,
    first_backward: int | None = None,
) -> tuple[int, ...]:
    """The cut of a model described by its layers."""
    costs = layer_costs(parameters, trained, recompute, first_backward)
    backward = head_trained or first_backward is not None or any(trained)
    return cut(costs, head_cost(head, head_trained, target_share, backward), stages)


@st.composite
def models(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """Costs of layers, cost of the head, number of stages."""
    costs = draw(st.lists(st.integers(0, 9), min_size=1, max_size=9))
    return costs, draw(st.integers(0, 30)), draw(st.integers(1, len(costs)))


def every_cut(layers: int, stages: int) -> list[tuple[int, ...]]:
    return list(combinations(range(1, layers), stages - 1))


@settings(max_examples=300)
@given(models())
def test_no_cut_is_better(model: tuple[list[int], int, int]) -> None:
    costs, head, stages = model

    def rank(begins: tuple[int, ...]) -> tuple[int, int, tuple[int, ...]]:
        each = pipeline_stage_costs(costs, head, begins)
        return max(each), sum(value**2 for value in each), begins

    assert cut(costs, head, stages) == min(every_cut(len(costs), stages), key=rank)


def test_equal_layers_are_shared_equally() -> None:
    assert cut([1] * 12, 0, 3) == (4, 8)
    assert cut([1] * 12, 0, 1) == ()
    assert cut([1] * 4, 0, 4) == (1, 2, 3)
    # One layer too many goes to the later stage.
    assert cut([1] * 5, 0, 2) == (2,)


def test_the_last_stage_has_fewer_layers_for_its_head() -> None:
    assert cut([10] * 8, 20, 2) == (5,)
    # Where the head alone is slower than everything else, the other stages are still even.
    assert cut([10] * 7, 1000, 3) == (3, 6)


@pytest.mark.parametrize("stages", [0, 4])
def test_stages_without_a_layer_are_refused(stages: int) -> None:
    with pytest.raises(ValueError, match=f"3 layers cannot be cut into {stages} stages"):
        cut([1, 1, 1], 0, stages)


def test_only_layers_from_the_lowest_trained_one_have_a_backward_pass() -> None:
    assert layer_costs([10] * 4, [0, 0, 3, 0]) == [10, 10, 23, 20]
    assert layer_costs([10] * 4, [0, 0, 3, 0], recompute=True) == [10, 10, 33, 30]
    assert layer_costs([10] * 3, [0, 0, 0]) == [10, 10, 10]


def test_detection_goes_backward_through_every_layer_and_trains_none() -> None:
    assert layer_costs([10] * 3, [0, 0, 0], first_backward=0) == [20, 20, 20]
    assert layer_costs([10] * 3, [0, 0, 0], first_backward=2) == [10, 10, 20]


def test_the_head_works_on_target_tokens_alone() -> None:
    assert head_cost(100, trained=False, target_share=0.25) == 50
    assert head_cost(100, trained=True, target_share=0.25) == 75
    assert head_cost(100, trained=False, target_share=1.0, backward=False) == 100


def test_frozen_layers_at_the_bottom_make_the_first_stage_longer() -> None:
    alike = balanced_cut([100] * 12, [100] * 12, 0, False, 2)
    top_trained = balanced_cut([100] * 12, [0] * 8 + [10] * 4, 0, False, 2)
    assert alike == (6,)
    # 8 layers forward alone cost 800, the 4 above them 210 each.
    assert top_trained == (8,)
    # Recomputed, those 4 cost 310 each.
    assert balanced_cut([100] * 12, [0] * 8 + [10] * 4, 0, False, 2, recompute=True) == (9,)


def test_where_the_gradient_stops_decides_the_heads_cost_too() -> None:
    sizes, nothing = [10] * 6, [0] * 6
    # Forward alone: 4 layers, and 2 with the head of 20.
    assert balanced_cut(sizes, nothing, 20, False, 2, target_share=1.0) == (4,)
    # Detection doubles everything; a trained head alone only makes the head dearer.
    assert balanced_cut(sizes, nothing, 20, False, 2, target_share=1.0, first_backward=0) == (4,)
    assert balanced_cut(sizes, nothing, 20, True, 2, target_share=1.0) == (5,)


def test_published_sizes() -> None:
    """The top 4 layers' FFNs trained, half of the tokens are targets: two cases far from half of the layers."""
    # Gemma 3 270M: 18 layers of 5.6 million, and a head of 168 million that outweighs them all.
    ffn, head = 3 * 640 * 2048, 262_144 * 640
    assert balanced_cut([ffn + 640 * 256 * 10] * 18, [0] * 14 + [ffn] * 4, head, False, 2) == (17,)
    # Llama 2 7B: 32 layers of 202 million; 28 of them have no backward pass.
    ffn, head = 3 * 4096 * 11008, 32_000 * 4096
    assert balanced_cut([ffn + 4 * 4096 * 4096] * 32, [0] * 28 + [ffn] * 4, head, False, 2) == (20,)


@pytest.mark.parametrize("stages", [2, 7, 16])
def test_deep_models_are_quick(stages: int) -> None:
    begins = balanced_cut(list(range(1, 129)), [1] * 128, 500, True, stages)
    assert len(begins) == stages - 1
    assert list(begins) == sorted(set(begins))
