"""From awareness to a whole selection."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fabricate import PAIRS, awareness, random_awareness

from lander_ds.config.schema.method import BankChoice, LayerChoice, SelectConfig
from lander_ds.method.control import random_control
from lander_ds.method.relevance import relevance
from lander_ds.method.select import build_selection, divide
from lander_ds.method.selection import Bank

ALL = LayerChoice(criterion="all")


def test_order_of_banks_and_neurons() -> None:
    # fmt: off
    owners = torch.tensor([
        [1, 0, 1, 0, 1, 0, 1, 0, 1],
        [1, 1, 1, 0, 0, 0, 0, 1, 0],
        [1, 0, 0, 1, 0, 0, 1, 0, 0],
    ], dtype=torch.bool)
    # fmt: on
    layer = divide(7, owners, PAIRS[:3])
    assert layer.layer == 7
    assert layer.permutation.tolist() == [0, 4, 8, 1, 7, 3, 2, 6, 5]
    assert layer.permutation.dtype == torch.int64
    assert layer.banks == (
        Bank("general", PAIRS[:3], 1),
        Bank("specific", ("en-de",), 2),
        Bank("specific", ("en-fr",), 2),
        Bank("specific", ("en-ru",), 1),
        Bank("specific", ("en-de", "en-fr"), 1),
        Bank("specific", ("en-de", "en-ru"), 1),
        Bank("frozen", (), 1),
    )


def test_one_pair_is_specific_and_remarked() -> None:
    selection = build_selection(random_awareness(pairs=1), SelectConfig(), seed=1)
    assert all(layer.banks == (Bank("specific", ("en-de",), 40),) for layer in selection.layers)
    assert any("one pair, en-de" in remark for remark in selection.metadata["remarks"])


def test_shared_scope() -> None:
    data = random_awareness()
    selection = build_selection(data, SelectConfig(), seed=1)
    assert selection.pairs == PAIRS
    assert selection.neurons == 40
    best = relevance(data).mean(0).topk(4).indices.sort().values
    assert [layer.layer for layer in selection.layers] == best.tolist()
    for layer in selection.layers:
        assert layer.banks[0] == Bank("general", PAIRS, 37)
        assert {bank.kind for bank in layer.banks[1:]} == {"specific"}
        assert sum(bank.size for bank in layer.banks[1:]) == 3


def test_specific_neurons_are_the_pairs_own() -> None:
    phi = torch.ones(2, 2, 8)
    phi[0, 0, 3] = phi[1, 0, 6] = phi[1, 1, 0] = 5.0
    config = SelectConfig(ALL, BankChoice(rho=0.7))
    first, second = build_selection(awareness(phi), config, seed=1).layers
    assert first.permutation.tolist() == [0, 1, 2, 4, 5, 7, 3, 6]
    assert [bank.group for bank in first.banks] == ["general:en-de+en-fr", "specific:en-de", "specific:en-fr"]
    assert second.permutation.tolist()[-1] == 0
    assert second.banks[-1] == Bank("specific", ("en-fr",), 1)


def test_per_pair_scope_gives_neurons_only_to_the_pairs_that_selected_the_layer() -> None:
    mean = torch.zeros(3, 4, 6)
    mean[0, 0] = mean[1, 0] = 9.0  # en-de and en-fr: layer 0; en-ru: layer 2
    mean[2, 3] = 9.0
    data = awareness(random_awareness(3, 4, 6).phi(), mean)
    config = SelectConfig(LayerChoice(k=1, scope="per_pair"), BankChoice(rho=0.5))
    selection = build_selection(data, config, seed=1)
    assert selection.metadata["layer_pairs"] == {"0": ["en-de", "en-fr"], "2": ["en-ru"]}
    shared, single = selection.layers
    assert shared.banks[0].kind == "general"
    assert shared.banks[0].owners == ("en-de", "en-fr")
    assert single.banks == (Bank("specific", ("en-ru",), 6),)
    assert any("Layer 2 was selected by en-ru alone" in remark for remark in selection.metadata["remarks"])


def test_metadata() -> None:
    data = random_awareness()
    config = SelectConfig(LayerChoice(k=2), BankChoice(rho=0.5, min_awareness=0.1))
    selection = build_selection(data, config, seed=3)
    metadata = selection.metadata
    assert json.loads(json.dumps(metadata)) == metadata
    assert metadata["criteria"]["layers"] == {
        "criterion": "relevance",
        "k": 2,
        "scope": "shared",
        "layers": [],
    }
    assert metadata["criteria"]["banks"]["rho"] == 0.5
    assert set(metadata["criteria"]) == {"layers", "banks"}
    assert set(metadata["criteria"]["banks"]) == {"criterion", "rho", "spread", "min_awareness", "kappa"}
    other = replace(config, banks=replace(config.banks, owners="target"))
    assert build_selection(data, other, seed=3).metadata["criteria"]["banks"]["owners"] == "target"
    assert metadata["seed"] == 3
    assert metadata["base_fingerprint"] == "base"
    assert metadata["awareness_hash"] == data.content_hash()
    assert metadata["relevance"]["en-fr"] == relevance(data)[1].tolist()
    for layer in selection.layers:
        sizes = metadata["bank_sizes"][str(layer.layer)]
        assert sizes == {bank.group: bank.size for bank in layer.banks}
        assert sizes["frozen"] == 4


def test_no_preference_is_remarked() -> None:
    selection = build_selection(awareness(torch.ones(2, 2, 5)), SelectConfig(ALL), seed=1)
    remarks = selection.metadata["remarks"]
    assert [layer.banks for layer in selection.layers] == [(Bank("general", PAIRS[:2], 5),)] * 2
    assert sum("no specific bank" in remark for remark in remarks) == 2
    assert "Pair en-fr has no specific neuron in any layer." in remarks


class TestRandom:
    spread = SelectConfig(ALL, BankChoice(rho=0.6, min_awareness=0.2))
    random = replace(spread, banks=replace(spread.banks, criterion="random"))

    def test_same_banks_as_spread_other_neurons(self) -> None:
        data = random_awareness()
        like, control = (build_selection(data, config, seed=1) for config in (self.spread, self.random))
        for expected, layer in zip(like.layers, control.layers, strict=True):
            assert layer.banks == expected.banks
            assert not torch.equal(layer.permutation, expected.permutation)
            for neurons in layer.slices():
                assert torch.equal(neurons, neurons.sort().values)
        assert any("Random control" in remark for remark in control.metadata["remarks"])

    def test_seeded_by_seed_and_layer(self) -> None:
        data = random_awareness()
        first, again, other = (build_selection(data, self.random, seed) for seed in (1, 1, 2))
        assert all(
            torch.equal(a.permutation, b.permutation) for a, b in zip(first.layers, again.layers, strict=True)
        )
        assert not torch.equal(first.layers[0].permutation, other.layers[0].permutation)
        alone = replace(self.random, layers=LayerChoice(criterion="list", layers=(4,)))
        assert torch.equal(build_selection(data, alone, 1).layers[0].permutation, first.layers[4].permutation)

    def test_equal_layers_draw_different_neurons(self) -> None:
        twice = awareness(random_awareness(layers=1).phi().expand(-1, 2, -1))
        first, second = build_selection(twice, self.random, seed=1).layers
        assert first.banks == second.banks
        assert not torch.equal(first.permutation, second.permutation)

    def test_control_of_any_selection(self) -> None:
        config = SelectConfig(LayerChoice(k=2), BankChoice(criterion="ratio", rho=0.3))
        selection = build_selection(random_awareness(), config, seed=1)
        control = random_control(selection, seed=-5)
        assert [layer.banks for layer in control.layers] == [layer.banks for layer in selection.layers]
        assert control.metadata["criteria"] == selection.metadata["criteria"]

    def test_neurons_are_drawn_without_regard_to_the_awareness(self) -> None:
        phi = torch.ones(2, 1, 400)
        phi[0, 0, :40] = 9.0
        config = replace(self.random, banks=BankChoice(criterion="random", rho=0.9 - 1 / 400))
        drawn = build_selection(awareness(phi), config, seed=1).layers[0].slices()[1]
        assert len(drawn) == 40
        assert 0 < (drawn < 40).sum() < 20


bank_choices = st.builds(
    BankChoice,
    criterion=st.sampled_from(["spread", "ratio", "entropy", "random"]),
    rho=st.floats(0, 1),
    spread=st.sampled_from(["std", "cv"]),
    min_awareness=st.floats(0, 0.99),
    kappa=st.floats(0, 1, exclude_min=True),
)


@settings(max_examples=200)
@given(
    pairs=st.integers(1, 5),
    neurons=st.integers(1, 30),
    levels=st.integers(1, 4),
    seed=st.integers(-3, 2**40),
    scope=st.sampled_from(["shared", "per_pair"]),
    banks=bank_choices,
)
def test_every_neuron_is_in_exactly_one_bank(
    pairs: int, neurons: int, levels: int, seed: int, scope: str, banks: BankChoice
) -> None:
    # Few levels make many ties; level 0 makes dead neurons.
    generator = torch.Generator().manual_seed(seed % 1000)
    names = [f"xx-{number}" for number in range(pairs)]
    phi, mean = (torch.randint(levels, (pairs, 4, neurons), generator=generator) for _ in range(2))
    data = awareness(phi, mean, (phi > 0).double(), names)
    config = SelectConfig(LayerChoice(k=2, scope=scope), banks)  # type: ignore[arg-type]
    selection = build_selection(data, config, seed)
    assert len(selection.layers) >= 2
    for layer in selection.layers:
        assert sorted(layer.permutation.tolist()) == list(range(neurons))
        assert sum(bank.size for bank in layer.banks) == neurons
        assert min(bank.size for bank in layer.banks) > 0
        assert len({bank.owners for bank in layer.banks}) == len(layer.banks)
        assert sorted(torch.cat(layer.slices()).tolist()) == list(range(neurons))
        order = [("general", "specific", "frozen").index(bank.kind) for bank in layer.banks]
        assert order == sorted(order)
        selected_by = selection.metadata["layer_pairs"][str(layer.layer)]
        for bank in layer.banks:
            assert set(bank.owners) <= set(selected_by)
            assert (bank.kind == "general") == (list(bank.owners) == selected_by and len(selected_by) > 1)
            assert (bank.kind == "frozen") == (not bank.owners)


@pytest.mark.parametrize("neurons", [1, 2])
def test_tiny_layers(neurons: int) -> None:
    selection = build_selection(random_awareness(2, 3, neurons), SelectConfig(ALL), seed=1)
    assert all(layer.banks == (Bank("general", PAIRS[:2], neurons),) for layer in selection.layers)
