"""Which layers each criterion chooses."""

from __future__ import annotations

import pytest
import torch
from support.fabricate import PAIRS, awareness, random_awareness

from lander_ds.common.errors import ConfigError
from lander_ds.config.schema.method import LayerChoice
from lander_ds.method.awareness import Awareness
from lander_ds.method.layers import choose_layers


def with_relevance(*rows: list[float]) -> Awareness:
    """One neuron whose mean activation changes by `rows` [M][L - 1] from layer to layer."""
    mean = torch.zeros(len(rows), len(rows[0]) + 1, 1)
    mean[:, 1:, 0] = torch.tensor(rows).cumsum(1)
    return awareness(torch.ones_like(mean), mean)


def chosen(data: Awareness, **options: object) -> dict[int, tuple[str, ...]]:
    return choose_layers(data, LayerChoice(**options), seed=1)  # type: ignore[arg-type]


def test_relevance_takes_the_largest_differences() -> None:
    assert chosen(with_relevance([1, 5, 2, 4, 3]), k=2) == {1: ("en-de",), 3: ("en-de",)}


def test_relevance_takes_the_lower_layer_of_equals() -> None:
    assert list(chosen(with_relevance([2, 3, 2, 2, 3]), k=3)) == [0, 1, 4]


def test_shared_scope_ranks_by_the_mean_over_pairs() -> None:
    data = with_relevance([9, 0, 5, 0], [0, 8, 5, 0])
    assert chosen(data, k=1) == {2: ("en-de", "en-fr")}


def test_per_pair_scope_is_the_union_of_each_pairs_top() -> None:
    data = with_relevance([9, 0, 5, 1], [0, 8, 5, 1])
    assert chosen(data, k=2, scope="per_pair") == {0: ("en-de",), 1: ("en-fr",), 2: ("en-de", "en-fr")}


def test_awareness_is_normalised_per_pair() -> None:
    # en-fr has a thousand times the awareness; unnormalised it would decide for layer 0.
    data = awareness([[[0.0], [1.0], [9.0]], [[4000.0], [3000.0], [3000.0]]])
    assert list(chosen(data, criterion="awareness", k=1)) == [2]


def test_awareness_may_choose_the_last_layer_and_survives_a_pair_without_any() -> None:
    data = awareness([[[1.0], [2.0]], [[0.0], [0.0]]])
    assert list(chosen(data, criterion="awareness", k=1)) == [1]


@pytest.mark.parametrize(
    ("k", "expected"), [(1, [0]), (2, [0, 5]), (3, [0, 1, 5]), (4, [0, 1, 4, 5]), (6, list(range(6)))]
)
def test_ends(k: int, expected: list[int]) -> None:
    assert list(chosen(random_awareness(), criterion="ends", k=k)) == expected


def test_cost_aware_relevance_is_per_unit_of_step_time() -> None:
    # Time of a step is 10 forward, and 10, 9, ... 5 backward. 10 / 20 for layer 0, 9 / 18 for layer 2: equal, the
    # higher one is taken; and with a little more relevance layer 0.
    assert list(chosen(with_relevance([10, 0, 9, 0, 0, 0, 0, 0, 0]), k=1, cost_aware=True)) == [2]
    assert list(chosen(with_relevance([10.1, 0, 9, 0, 0, 0, 0, 0, 0]), k=1, cost_aware=True)) == [0]
    # Two layers: (10 + 9) / 20 against (9 + 8) / 18.
    assert list(chosen(with_relevance([10, 0, 9, 0, 8, 0, 0, 0, 0]), k=2, cost_aware=True)) == [0, 2]
    assert list(chosen(with_relevance([10, 0, 9, 0, 8.2, 0, 0, 0, 0]), k=2, cost_aware=True)) == [2, 4]


def test_cost_aware_choice_per_pair_and_of_every_layer() -> None:
    data = with_relevance([10, 0, 9.5, 0], [9, 0, 0, 7])
    assert chosen(data, k=1, cost_aware=True, scope="per_pair") == {2: ("en-de",), 3: ("en-fr",)}
    assert list(chosen(random_awareness(), criterion="awareness", k=6, cost_aware=True)) == list(range(6))


def test_last() -> None:
    assert chosen(random_awareness(), criterion="last", k=2) == {4: PAIRS, 5: PAIRS}


@pytest.mark.parametrize("scope", ["shared", "per_pair"])
def test_all(scope: str) -> None:
    assert chosen(random_awareness(), criterion="all", k=99, scope=scope) == dict.fromkeys(range(6), PAIRS)


def test_list_is_sorted() -> None:
    assert list(chosen(random_awareness(), criterion="list", layers=(5, 0, 3), k=99)) == [0, 3, 5]


def test_random_depends_on_the_seed_only() -> None:
    choice = LayerChoice(criterion="random", k=3)
    draws = [tuple(choose_layers(random_awareness(seed=seed), choice, seed=7)) for seed in range(3)]
    assert len(set(draws)) == 1
    assert len({tuple(choose_layers(random_awareness(), choice, seed=seed)) for seed in range(-5, 15)}) > 5
    counts = torch.zeros(6)
    for seed in range(300):
        counts[list(choose_layers(random_awareness(), choice, seed))] += 1
    assert counts.sum() == 900
    assert counts.min() > 100


def test_random_per_pair_draws_for_each_pair() -> None:
    layers = chosen(random_awareness(layers=30), criterion="random", k=2, scope="per_pair")
    assert len(layers) > 2
    assert all(sum(pair in owners for owners in layers.values()) == 2 for pair in PAIRS)


@pytest.mark.parametrize("criterion", ["awareness", "last", "random"])
def test_every_layer_can_be_chosen(criterion: str) -> None:
    assert list(chosen(random_awareness(), criterion=criterion, k=6)) == list(range(6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 6}, r"select\.layers\.k is 6, .*1 to 5 of the model's 6 layers \(the last layer"),
        ({"k": 6, "scope": "per_pair"}, r"select\.layers\.k is 6"),
        ({"k": 7, "criterion": "last"}, r"select\.layers\.k is 7, .*1 to 6 of"),
        ({"k": 7, "criterion": "random"}, r"select\.layers\.k is 7"),
        ({"k": 7, "criterion": "awareness"}, r"select\.layers\.k is 7"),
        ({"criterion": "list"}, r"select\.layers\.layers is empty"),
        ({"criterion": "list", "layers": (0, 6)}, r"select\.layers\.layers names layer 6, .*0 to 5"),
        ({"criterion": "list", "layers": (-1,)}, r"select\.layers\.layers names layer -1"),
        ({"criterion": "list", "layers": (2, 3, 2)}, r"select\.layers\.layers names a layer twice"),
    ],
)
def test_impossible_choices(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        chosen(random_awareness(), **options)


def test_a_model_of_one_layer_has_no_relevance() -> None:
    with pytest.raises(ConfigError, match=r"1 to 0 of the model's 1 layers"):
        chosen(random_awareness(layers=1), k=1)
