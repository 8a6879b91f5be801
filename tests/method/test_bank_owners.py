"""Which pairs own each neuron, by every criterion (identity 7, second half)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lander_ds.config.schema.method import BankChoice
from lander_ds.method.banks import assign_owners, entropy_owners, normalise, ratio_owners, spread_owners

ZERO = torch.zeros


def tensor(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def owned(owners: torch.Tensor) -> list[str]:
    """Owners as text, one word per neuron: 'ab' is owned by pairs 0 and 1, '' by none."""
    return ["".join("abcdefgh"[row] for row, own in enumerate(column) if own) for column in owners.T.tolist()]


class TestSpread:
    def test_threshold_index(self) -> None:
        # Standard deviations 0, 1, 2, 3, 4: index floor(0.6 * 5) = 3 is still general.
        share = tensor([5, 6, 3, 8, 1], [5, 4, 7, 2, 9])
        assert owned(spread_owners(share, rho=0.6)) == ["ab", "ab", "ab", "ab", "b"]
        assert owned(spread_owners(share, rho=0.2)) == ["ab", "ab", "b", "a", "b"]
        assert owned(spread_owners(share, rho=0.0)) == ["ab", "a", "b", "a", "b"]

    @pytest.mark.parametrize("rho", [0.99, 1.0])
    def test_index_is_clamped(self, rho: float) -> None:
        assert owned(spread_owners(tensor([1, 2], [4, 3]), rho)) == ["ab", "ab"]

    def test_ties_at_the_threshold_are_all_general(self) -> None:
        share = tensor([1, 3, 1, 3, 9], [3, 1, 3, 1, 1])
        assert owned(spread_owners(share, rho=0.0)) == ["ab", "ab", "ab", "ab", "a"]

    def test_ties_between_pairs_go_to_the_first(self) -> None:
        share = tensor([1, 5, 0], [1, 5, 7], [1, 0, 7])
        assert owned(spread_owners(share, rho=0.0)) == ["abc", "a", "b"]

    def test_equal_pairs_have_no_preference_despite_rounding(self) -> None:
        row = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        share = torch.stack([row / 3] * 3 + [row * (1 / 3)])
        assert set(owned(spread_owners(share, rho=0.5))) == {"abcd"}

    def test_cv_is_relative_to_the_mean(self) -> None:
        # The faint neuron 1 prefers b far more strongly than the loud neuron 2 prefers a.
        share = tensor([50, 0.0, 60], [50, 0.1, 50])
        assert owned(spread_owners(share, rho=0.4)) == ["ab", "ab", "a"]
        assert owned(spread_owners(share, rho=0.4, relative=True)) == ["ab", "b", "ab"]

    def test_cv_of_a_dead_neuron_is_zero(self) -> None:
        assert owned(spread_owners(tensor([0, 1, 9], [0, 2, 1]), rho=0.0, relative=True)) == ["ab", "b", "a"]

    def test_rho_times_f_does_not_lose_a_neuron_to_rounding(self) -> None:
        # 0.29 * 100 is 28.999999999999996 in floating point; the index is 29, so 30 neurons are general.
        share = torch.stack([torch.arange(100.0), torch.zeros(100)]).double()
        assert sum(word == "ab" for word in owned(spread_owners(share, rho=0.29))) == 30


class TestRatio:
    def test_several_owners(self) -> None:
        share = tensor([9, 5, 1.0, 0.1], [9, 4, 0.8, 1.0], [9, 1, 0.6, 0.2])
        assert owned(ratio_owners(share, rho=0.25, kappa=0.7)) == ["abc", "ab", "ab", "b"]

    def test_a_neuron_that_every_pair_owns_is_general(self) -> None:
        assert owned(ratio_owners(tensor([9, 1.0], [9, 0.9]), rho=0.5, kappa=0.7)) == ["ab", "ab"]

    def test_exactly_kappa_is_not_enough(self) -> None:
        assert owned(ratio_owners(tensor([2.0], [1.0]), rho=0.0, kappa=0.5)) == ["a"]

    @pytest.mark.parametrize(("kappa", "expected"), [(1.0, ["a", "ab", ""]), (0.0, ["ab", "ab", ""])])
    def test_extreme_kappa(self, kappa: float, expected: list[str]) -> None:
        assert owned(ratio_owners(tensor([2, 1, 0], [1, 1, 0]), rho=0.0, kappa=kappa)) == expected

    def test_importance_ties_take_the_lower_index(self) -> None:
        assert owned(ratio_owners(tensor([3, 3, 3, 3], [0, 0, 0, 0]), rho=0.5, kappa=0.7)) == [
            "ab",
            "ab",
            "a",
            "a",
        ]


class TestEntropy:
    def test_lowest_entropy_is_specific(self) -> None:
        probability = tensor([0.5, 0.9, 0.2, 0.5, 0.3], [0.5, 0.1, 0.3, 0.0, 0.3])
        assert owned(entropy_owners(probability, rho=0.6)) == ["ab", "a", "ab", "a", "ab"]

    def test_it_is_the_relative_probability_that_counts(self) -> None:
        # Neuron 0 is active rarely but only for b; neuron 1 often and nearly evenly.
        assert owned(entropy_owners(tensor([0.0, 0.9], [0.01, 0.8]), rho=0.5)) == ["b", "ab"]

    def test_no_preference_is_never_specific(self) -> None:
        probability = tensor([0.0, 0.4, 1.0, 0.3], [0.0, 0.4, 1.0, 0.1])
        assert owned(entropy_owners(probability, rho=0.0)) == ["ab", "ab", "ab", "a"]

    def test_ties_take_the_lower_index(self) -> None:
        assert owned(entropy_owners(tensor([1, 0, 1.0], [0, 1, 0.0]), rho=0.4)) == ["a", "b", "ab"]


class TestMinAwareness:
    def test_least_aware_neurons_are_frozen_first(self) -> None:
        phi = tensor([1, 40, 2, 50, 60, 30], [1, 40, 3, 60, 50, 30])
        choice = BankChoice(rho=0.49, min_awareness=0.34)  # rho counts the four that are left
        assert owned(assign_owners(phi, ZERO(2, 6), choice)) == ["", "ab", "", "b", "a", "ab"]

    def test_no_pair_dominates(self) -> None:
        # Neuron 1 is the least aware by the raw sum, neuron 0 once each pair's awareness is normalised.
        phi = tensor([300.0, 0.0, 700.0], [0.0, 0.5, 0.5])
        assert owned(assign_owners(phi, ZERO(2, 3), BankChoice(rho=1.0, min_awareness=0.34)))[0] == ""

    @pytest.mark.parametrize("criterion", ["spread", "ratio", "entropy", "random"])
    def test_every_criterion_has_it(self, criterion: str) -> None:
        phi = tensor([0, 1, 2, 3], [0, 3, 2, 1])
        choice = BankChoice(criterion=criterion, min_awareness=0.25)  # type: ignore[arg-type]
        words = owned(assign_owners(phi, tensor([1, 1, 1, 1], [0, 1, 1, 1]), choice))
        assert words[0] == ""
        assert all(words[1:])

    def test_ties_freeze_the_lower_index(self) -> None:
        assert owned(assign_owners(torch.ones(2, 4), ZERO(2, 4), BankChoice(min_awareness=0.5))) == [
            "",
            "",
            "ab",
            "ab",
        ]


@pytest.mark.parametrize("criterion", ["spread", "ratio", "entropy", "random"])
def test_one_pair_owns_everything(criterion: str) -> None:
    phi = tensor([0, 5, 1, 3])
    assert owned(assign_owners(phi, phi / 5, BankChoice(criterion=criterion))) == ["a"] * 4  # type: ignore[arg-type]
    frozen = BankChoice(criterion=criterion, min_awareness=0.5)  # type: ignore[arg-type]
    assert owned(assign_owners(phi, phi / 5, frozen)) == ["", "a", "", "a"]


@pytest.mark.parametrize("criterion", ["spread", "ratio", "entropy", "random"])
@pytest.mark.parametrize("spread", ["std", "cv"])
def test_no_awareness_at_all(criterion: str, spread: str) -> None:
    choice = BankChoice(criterion=criterion, spread=spread, rho=0.0)  # type: ignore[arg-type]
    expected = "" if criterion == "ratio" else "abc"
    assert owned(assign_owners(ZERO(3, 5), ZERO(3, 5), choice)) == [expected] * 5


def test_one_pair_without_awareness_does_not_spoil_the_others() -> None:
    share = normalise(tensor([0, 0, 0], [1, 2, 1]))
    assert share.tolist() == [[0, 0, 0], [0.25, 0.5, 0.25]]


@settings(max_examples=150)
@given(
    phi=st.integers(2, 5).flatmap(
        lambda pairs: st.integers(1, 12).flatmap(
            lambda neurons: st.lists(
                st.lists(
                    st.sampled_from([0.0, 1e-12, 0.5, 1.0, 3.0, 1e6]), min_size=neurons, max_size=neurons
                ),
                min_size=pairs,
                max_size=pairs,
            )
        )
    ),
    rho=st.floats(0, 1),
)
def test_spread_obeys_its_threshold(phi: list[list[float]], rho: float) -> None:
    values = tensor(*phi)
    owners = assign_owners(values, torch.zeros_like(values), BankChoice(rho=rho))
    count = owners.sum(0)
    general = count == len(phi)
    # Enough neurons are general; each specific one belongs to the pair with the largest share alone.
    assert general.sum() >= min(int(rho * values.shape[1]) + 1, values.shape[1])
    share = normalise(values)
    for neuron in torch.nonzero(~general).squeeze(1).tolist():
        assert count[neuron] == 1
        assert share[owners[:, neuron], neuron] == share[:, neuron].max()
        assert share[:, neuron].std() > share[:, general].std(0).max() - 1e-12
