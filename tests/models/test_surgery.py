"""Surgery on every family: exact on the way in and on the way out, also through transformers' own forward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.selections import PAIRS, random_selection
from support.tiny_models import DIFFERENT, examples, laid_out, tiny_model
from torch import nn

from lander_ds.common.errors import ArtefactError, ModelError
from lander_ds.config.schema.method import RoutingConfig
from lander_ds.method.selection import Selection
from lander_ds.models.catalogue import family_of
from lander_ds.models.family import Family
from lander_ds.models.routed_ffn import RoutedFFN, Routing, routed
from lander_ds.models.surgery import install, remove, routed_ffns, slices

LAYERS = (0, 2)


def cut(case: str, routing: RoutingConfig | None = None) -> tuple[nn.Module, Family, Selection]:
    model = laid_out(case)
    family = family_of(model.config.model_type)
    selection = random_selection(family.neurons(model), LAYERS)
    install(model, family, selection, routing or RoutingConfig(hidden=8), seed=3)
    return model, family, selection


@pytest.mark.parametrize("case", DIFFERENT)
def test_remove_is_the_inverse_of_install(case: str) -> None:
    before = laid_out(case).state_dict()
    model, family, _ = cut(case)
    assert [ffn.layer for _, ffn in routed_ffns(model)] == list(LAYERS)
    remove(model, family)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not list(routed_ffns(model))
    assert [type(module) for module in model.modules()] == [
        type(module) for module in laid_out(case).modules()
    ]
    with torch.no_grad():
        ids = examples()[0][None]
        assert torch.equal(model(ids).logits, laid_out(case)(ids).logits)


def test_remove_works_on_meta() -> None:
    with torch.device("meta"):
        model = type(tiny_model("llama"))(tiny_model("llama").config)
    family = family_of("llama")
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    install(model, family, random_selection(48, LAYERS), RoutingConfig(), seed=1)
    remove(model, family)
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes


@pytest.mark.parametrize("case", DIFFERENT)
def test_trained_banks_come_back_to_their_own_rows_and_columns(case: str) -> None:
    model, family, selection = cut(case)
    before = laid_out(case).state_dict()
    cuts = slices(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".banks.1." in name:
                parameter.add_(1.0)
    remove(model, family)
    for name, value in model.state_dict().items():
        changed = torch.zeros_like(value, dtype=torch.bool)
        for parameter, source in cuts.items():  # type: ignore[assignment]
            if source.tensor == name and ".banks.1." in parameter:
                assert source.dim is not None
                changed.index_fill_(source.dim, source.neurons, True)
        assert torch.equal(value != before[name], changed), name
    specific = selection.layer(0).slices()[1].sort().values
    assert any(torch.equal(source.neurons.sort().values, specific) for source in cuts.values())


@pytest.mark.parametrize("gate", ["none", "input", "output"])
@pytest.mark.parametrize("case", DIFFERENT)
def test_logits_are_the_base_models(case: str, gate: str) -> None:
    model, _, _ = cut(case, RoutingConfig(gate=gate, hidden=8))  # type: ignore[arg-type]
    reference = laid_out(case)
    ids = torch.stack([examples()[0], examples()[2][:9]])
    with torch.no_grad():
        expected = reference(ids).logits
        for pair_ids in (torch.tensor(0), torch.tensor([1, 2]), torch.randint(0, 3, ids.shape)):
            with routed(Routing(pair_ids)):
                torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("case", DIFFERENT)
def test_generation_with_cache_and_left_padding_is_the_base_models(case: str, beams: int) -> None:
    model, _, _ = cut(case)
    reference = laid_out(case)
    short, _, long = examples()
    ids = torch.stack([torch.cat([torch.zeros(5, dtype=torch.long), short]), long])
    options = {
        "attention_mask": (ids != 0).long(),
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "num_beams": beams,
        "pad_token_id": 0,
    }
    expected = reference.generate(ids, **options)
    for pair_ids in (torch.tensor(2), torch.tensor([0, 1])):
        with routed(Routing(pair_ids)):
            assert torch.equal(model.generate(ids, **options), expected)  # type: ignore[operator]


@pytest.mark.parametrize("case", ["gemma3", "bloom", "opt"])
def test_generation_with_trained_gates_does_not_depend_on_the_cache(case: str) -> None:
    model, _, _ = cut(case, RoutingConfig(hidden=8, other_pairs="mask"))
    torch.manual_seed(0)
    for _, ffn in routed_ffns(model):
        assert ffn.router is not None
        nn.init.normal_(ffn.router.w2)
    ids = torch.stack([examples()[0], examples()[2][:9]])
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
    }
    with routed(Routing(torch.tensor([0, 1]))), torch.no_grad():
        cached = model.generate(ids, **options)  # type: ignore[operator]
        assert torch.equal(model.generate(ids, use_cache=False, **options), cached)  # type: ignore[operator]
        ordered = model(ids).logits
    with routed(Routing(torch.tensor([1, 0]))), torch.no_grad():
        assert (model(ids).logits - ordered).abs().max() > 1e-3


def test_surgery_freezes_everything_but_the_gates_and_names_the_groups() -> None:
    model, _, selection = cut("llama")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".router." in name for name in trained)
    for (_, ffn), chosen in zip(routed_ffns(model), selection.layers, strict=True):
        assert [bank.group for bank in ffn.banks] == [bank.group for bank in chosen.banks]
        assert [bank.up.shape[0] for bank in ffn.banks] == [bank.size for bank in chosen.banks]  # type: ignore[index]


def test_the_gates_values_depend_on_seed_and_layer_alone() -> None:
    def first_weights(case: str, layers: tuple[int, ...], seed: int) -> dict[int, torch.Tensor]:
        model = laid_out(case)
        family = family_of(model.config.model_type)
        install(model, family, random_selection(family.neurons(model), layers), RoutingConfig(hidden=8), seed)
        return {ffn.layer: ffn.router.w1.detach() for _, ffn in routed_ffns(model) if ffn.router is not None}

    one, other = first_weights("llama", (0, 2), 4), first_weights("qwen3", (1, 2), 4)
    assert torch.equal(one[2], other[2])
    assert not torch.equal(one[0], one[2])
    assert not torch.equal(first_weights("llama", (2,), 5)[2], one[2])


@pytest.mark.parametrize(("neurons", "layers"), [(47, (0,)), (48, (0, 3))])
def test_a_selection_for_another_model_is_refused(neurons: int, layers: tuple[int, ...]) -> None:
    with pytest.raises(ArtefactError, match=r"this model has 48 neurons and 3 layers: run stages detect"):
        install(
            tiny_model("llama"),
            family_of("llama"),
            random_selection(neurons, layers),
            RoutingConfig(),
            seed=0,
        )


def test_ffns_that_cannot_be_split_are_refused() -> None:
    config = tiny_model("llama").config
    config.mlp_bias = True
    biased = type(tiny_model("llama"))(config)
    with pytest.raises(ModelError, match=r"model\.layers\.1: a gated FFN with biases"):
        install(biased, family_of("llama"), random_selection(48, (1,)), RoutingConfig(), seed=0)
    bloom = tiny_model("bloom")
    bloom.config.slow_but_exact, bloom.config.pretraining_tp = True, 2
    with pytest.raises(ModelError, match="slow_but_exact"):
        install(bloom, family_of("bloom"), random_selection(144, (1,)), RoutingConfig(), seed=0)
    odd = replace(family_of("llama"), ffn=replace(family_of("llama").ffn, down="input_layernorm"))
    with pytest.raises(ModelError, match=r"layers\.1\.input_layernorm: expected a linear projection"):
        install(tiny_model("llama"), odd, random_selection(48, (1,)), RoutingConfig(), seed=0)


def test_one_pair_alone_and_one_bank_alone() -> None:
    reference = tiny_model("opt")
    for pairs in (("en-de",), PAIRS):
        model = tiny_model("opt")
        selection = random_selection(48, (1,), pairs, frozen=False)
        install(model, family_of("opt"), selection, RoutingConfig(hidden=8), seed=0)
        ffn = next(routed_ffns(model))[1]
        assert isinstance(ffn, RoutedFFN)
        with routed(Routing(torch.tensor(0))), torch.no_grad():
            ids = examples()[0][None]
            torch.testing.assert_close(model(ids).logits, reference(ids).logits, atol=1e-5, rtol=1e-5)
