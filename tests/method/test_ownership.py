"""Banks over all chosen layers together, and banks that a language owns."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fabricate import PAIRS, awareness, random_awareness

from lander_ds.common.errors import ArtefactError, ConfigError
from lander_ds.config.schema.method import BankChoice, LayerChoice, SelectConfig, ShieldConfig
from lander_ds.method.banks import top_owners
from lander_ds.method.ownership import shield_of
from lander_ds.method.select import build_selection
from lander_ds.method.selection import Bank, Selection

ALL = LayerChoice(criterion="all")
EVERYBODY = torch.ones(3, 2, dtype=torch.bool)


def top(share: float, quorum: float = 1.0, owners: str = "pair") -> BankChoice:
    return BankChoice(criterion="top", share=share, quorum=quorum, owners=owners)  # type: ignore[arg-type]


def owned(selection: Selection) -> dict[int, dict[str, list[int]]]:
    return {
        layer.layer: {
            bank.group: neurons.tolist()
            for bank, neurons in zip(layer.banks, layer.slices(), strict=True)
            if bank.kind != "frozen"
        }
        for layer in selection.layers
    }


class TestTop:
    def test_each_pair_has_its_share_over_all_layers_together(self) -> None:
        phi = torch.tensor(
            [[[9, 1, 1, 1], [8, 7, 1, 1], [1, 1, 1, 1]], [[9, 1, 1, 1], [1, 7, 8, 1], [1, 1, 1, 1]]]
        )
        selection = build_selection(awareness(phi), SelectConfig(ALL, top(0.25)), seed=1)
        assert owned(selection) == {
            0: {"general:en-de+en-fr": [0]},
            1: {"general:en-de+en-fr": [1], "specific:en-de": [0], "specific:en-fr": [2]},
        }
        assert [bank.kind for bank in selection.layers[0].banks] == ["general", "frozen"]
        assert "No neuron of the layers 2 is owned by any pair" in " ".join(selection.metadata["remarks"])
        assert set(selection.metadata["layer_pairs"]) == {"0", "1"}

    def test_the_scale_of_a_pairs_awareness_does_not_matter(self) -> None:
        data = random_awareness()
        phi = data.phi()
        phi[1] *= 1e6
        one, other = (build_selection(d, SelectConfig(ALL, top(0.1)), 1) for d in (data, awareness(phi)))
        assert owned(one) == owned(other)

    def test_quorum(self) -> None:
        phi = torch.zeros(4, 1, 4)
        phi[:, 0, 0] = 9  # all four
        phi[:3, 0, 1] = 8  # three
        phi[:2, 0, 2] = 7  # two
        phi[3, 0, 3] = 1  # one
        takes_part = torch.ones(4, 1, dtype=torch.bool)

        def counts(quorum: float) -> list[int]:
            return top_owners(phi.double(), takes_part, 1.0, quorum).sum(0)[0].tolist()

        assert counts(1.0) == [4, 3, 2, 1]
        assert counts(0.75) == [4, 4, 2, 1]
        assert counts(0.5) == [4, 4, 4, 1]
        assert counts(0.01) == [4, 4, 4, 1], "one pair alone makes nothing general"

    def test_equals_and_dead_neurons(self) -> None:
        phi = torch.ones(1, 2, 3, dtype=torch.float64)
        takes_part = torch.ones(1, 2, dtype=torch.bool)
        assert top_owners(phi, takes_part, 0.5, 1.0).int().tolist() == [[[1, 1, 1], [0, 0, 0]]]
        phi[0, 0, 1:] = 0
        phi[0, 1] = 0
        assert top_owners(phi, takes_part, 0.5, 1.0).int().tolist() == [[[1, 0, 0], [0, 0, 0]]]

    def test_a_pair_owns_neurons_in_its_own_layers_alone(self) -> None:
        mean = torch.zeros(3, 4, 6)
        mean[0, 0] = mean[1, 0] = 9.0  # en-de and en-fr: layer 0; en-ru: layer 2
        mean[2, 3] = 9.0
        data = awareness(torch.ones(3, 4, 6), mean)
        selection = build_selection(
            data, SelectConfig(LayerChoice(k=1, scope="per_pair"), top(0.5, 0.75)), seed=1
        )
        assert owned(selection) == {0: {"general:en-de+en-fr": [0, 1, 2]}, 2: {"specific:en-ru": [0, 1, 2]}}

    def test_one_pair_is_specific(self) -> None:
        selection = build_selection(random_awareness(pairs=1), SelectConfig(ALL, top(0.1)), seed=1)
        assert {bank.kind for layer in selection.layers for bank in layer.banks} == {"specific", "frozen"}
        assert sum(b.size for layer in selection.layers for b in layer.banks if b.kind == "specific") == 24

    def test_no_neuron_at_all_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"select\.banks\.share: 0\.001 of the 240 neurons.*raise it"):
            build_selection(random_awareness(), SelectConfig(ALL, top(0.001)), seed=1)

    def test_random_control_of_it(self) -> None:
        data = random_awareness()
        like = build_selection(data, SelectConfig(ALL, top(0.05, 0.5)), seed=1)
        choice = BankChoice(criterion="random", like="top", share=0.05, quorum=0.5)
        control = build_selection(data, SelectConfig(ALL, choice), seed=1)
        assert [(s.layer, s.banks) for s in control.layers] == [(s.layer, s.banks) for s in like.layers]
        assert owned(control) != owned(like)


@settings(max_examples=60)
@given(pairs=st.integers(1, 5), levels=st.integers(2, 5), seed=st.integers(0, 999), share=st.floats(0.1, 1))
def test_the_top_of_a_pair_is_at_least_its_share(pairs: int, levels: int, seed: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    phi = torch.randint(levels, (pairs, 3, 10), generator=generator).double()
    takes_part = torch.ones(pairs, 3, dtype=torch.bool)
    alone = torch.stack([top_owners(one[None], takes_part[:1], share, 1.0)[0] for one in phi])
    owners = top_owners(phi, takes_part, share, 0.6)
    assert (owners >= alone).all()
    for own, values in zip(alone, phi, strict=True):
        assert int(own.sum()) == min(int(share * 30 + 1e-9), int((values > 0).sum()))
        if own.any() and not own.all():
            assert values[own].min() >= values[~own].max()
    more = (owners & ~alone).any(0)
    assert (owners[:, more].all(0)).all(), "who owns more than its own top shares a general neuron"


class TestOwners:
    PAIRS = ("de-en", "fr-en", "en-de")

    def test_pairs_into_one_language_own_a_bank_together(self) -> None:
        data = awareness(random_awareness(3).phi(), pairs=self.PAIRS)
        selection = build_selection(data, SelectConfig(ALL, BankChoice(rho=0.5, owners="target")), seed=1)
        groups = {bank.group for layer in selection.layers for bank in layer.banks}
        assert groups == {"general:de-en+fr-en+en-de", "specific:de-en+fr-en", "specific:en-de"}

    def test_their_awareness_is_that_of_all_their_tokens(self) -> None:
        # de-en has 100 tokens and fr-en 200: together neuron 0 has (100 * 6 + 200 * 0) / 300 = 2, en-de has 3.
        phi = torch.tensor([[[6.0, 1, 1]], [[0.0, 1, 1]], [[3.0, 1, 1]]])
        choice = top(0.34, owners="target")
        together = build_selection(awareness(phi, pairs=self.PAIRS), SelectConfig(ALL, choice), seed=1)
        assert owned(together) == {0: {"general:de-en+fr-en+en-de": [0]}}
        alone = build_selection(awareness(phi, pairs=self.PAIRS), SelectConfig(ALL, top(0.34)), seed=1)
        assert owned(alone) == {0: {"specific:fr-en": [1], "specific:de-en+en-de": [0]}}

    def test_by_source(self) -> None:
        data = awareness(random_awareness(3).phi(), pairs=("en-de", "en-fr", "de-en"))
        selection = build_selection(data, SelectConfig(ALL, BankChoice(rho=0.5, owners="source")), seed=1)
        groups = {bank.group for layer in selection.layers for bank in layer.banks}
        assert groups == {"general:en-de+en-fr+de-en", "specific:en-de+en-fr", "specific:de-en"}

    def test_one_language_alone_makes_everything_general(self) -> None:
        choice = BankChoice(owners="source")
        selection = build_selection(random_awareness(), SelectConfig(ALL, choice), seed=1)
        assert all(layer.banks == (Bank("general", PAIRS, 40),) for layer in selection.layers)

    @pytest.mark.parametrize("criterion", ["spread", "ratio", "entropy"])
    def test_pairs_with_a_language_each_are_as_before(self, criterion: str) -> None:
        one, other = (
            build_selection(random_awareness(), SelectConfig(ALL, BankChoice(criterion, 0.5, owners=who)), 1)  # type: ignore[arg-type]
            for who in ("pair", "target")
        )
        assert owned(one) == owned(other)


class TestShield:
    def test_the_most_aware_neurons_of_all_layers_of_pairs_alike(self) -> None:
        phi = torch.ones(2, 2, 5)
        phi[0, 1, 3] = 9
        phi[1] *= 1000
        phi[1, 0, 2] = 7000
        assert shield_of(awareness(phi), 0.2).nonzero().tolist() == [[0, 2], [1, 3]]
        with pytest.raises(ConfigError, match=r"select\.shield\.share: 0\.05 of 10 neurons is not one"):
            shield_of(awareness(phi), 0.05)

    @pytest.mark.parametrize("criterion", ["spread", "ratio", "entropy", "top", "random"])
    def test_nobody_owns_them(self, criterion: str) -> None:
        data, other = random_awareness(), random_awareness(seed=5)
        banks = BankChoice(criterion=criterion, rho=0.5, share=0.2)  # type: ignore[arg-type]
        config = SelectConfig(ALL, banks, ShieldConfig(share=0.25))
        selection = build_selection(data, config, seed=1, shield=other)
        shielded, frozen = shield_of(other, 0.25), 0
        for layer in selection.layers:
            rest = {
                neuron
                for b, n in zip(layer.banks, layer.slices(), strict=True)
                if b.kind == "frozen"
                for neuron in n.tolist()
            }
            frozen += len(rest)
            if criterion != "random":
                assert set(shielded[layer.layer].nonzero().flatten().tolist()) <= rest
        assert (frozen == 60) == (criterion != "top")

    def test_a_layer_that_is_shielded_whole_is_left_alone(self) -> None:
        phi = torch.ones(2, 3, 5)
        phi[:, 1] = 9
        config = SelectConfig(ALL, shield=ShieldConfig(share=0.34))
        selection = build_selection(random_awareness(2, 3, 5), config, seed=1, shield=awareness(phi))
        assert [layer.layer for layer in selection.layers] == [0, 2]

    def test_of_another_base(self) -> None:
        with pytest.raises(
            ArtefactError, match=r"from another base model .* run stage detect of that recipe"
        ):
            build_selection(random_awareness(), SelectConfig(ALL), 1, shield=random_awareness(layers=3))
