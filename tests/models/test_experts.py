"""Mixtures of experts: laid out anew they compute what transformers computes, and banks cut across them what banks of
plain FFNs compute, expert by expert."""

from __future__ import annotations

import json
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import recipe_for
from support.tiny_models import examples, laid_out, save, tiny_model
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel, Qwen3MoeConfig

from lander_ds.common.errors import ModelError
from lander_ds.config.recipe import ModelConfig
from lander_ds.method.awareness import STATISTICS
from lander_ds.method.collector import StatisticsCollector
from lander_ds.models.catalogue import family_of
from lander_ds.models.experts import Dispatch, Experts
from lander_ds.models.loading import build, fill
from lander_ds.models.parameter_groups import mark_trained, prepare_model
from lander_ds.models.routed_ffn import BankFFN, Gate, RoutedFFN, Routing, routed
from lander_ds.models.weights import BaseWeights

CASES = ("qwen3-moe", "mixtral-moe")
T, D, F, EXPERTS, CHOICES = 11, 5, 6, 4, 2
PAIRS = ("en-de", "en-fr", "de-en")
UNUSED = 3
"""The expert to which no token is sent."""
BANKS: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = (
    ("general", (0, 1, 2), (2, 0, 1, 3)),
    ("specific", (0,), (1, 3, 0, 1)),
    ("specific", (0, 2), (0, 1, 2, 1)),
    ("frozen", (), (3, 2, 3, 1)),
)
"""(kind, owners, neurons by expert)."""


def loss_and_gradients(model: PreTrainedModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.requires_grad_(True)
    ids = torch.cat(list(examples()))[None]
    loss = functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
    loss.backward()
    return loss.detach(), {
        name: p.grad for name, p in model.named_parameters() if isinstance(p.grad, torch.Tensor)
    }


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_transformers(case: str) -> None:
    (loss, ours), (expected, theirs) = (
        loss_and_gradients(laid_out(case)),
        loss_and_gradients(tiny_model(case)),
    )
    torch.testing.assert_close(loss, expected)
    # Sums in another order; gradients are up to 29.
    close = partial(torch.testing.assert_close, atol=1e-4, rtol=1e-5)
    for name, grad in theirs.items():
        if name.endswith("gate_up_proj"):
            prefix, f = name.removesuffix("gate_up_proj"), grad.shape[1] // 2
            for half, role in ((grad[:, :f], "gate"), (grad[:, f:], "up")):
                close(ours[f"{prefix}{role}_proj.weight"], half.flatten(0, 1))
        elif name.endswith("experts.down_proj"):
            close(ours[f"{name}.weight"], grad.permute(1, 0, 2).flatten(1))
        else:
            close(ours[name], grad, msg=name)


def chosen() -> tuple[torch.Tensor, torch.Tensor]:
    """Two experts for every token, [T, 2], and their weights."""
    generator = torch.Generator().manual_seed(5)
    order = torch.rand(T, EXPERTS - 1, generator=generator).argsort(1)[:, :CHOICES]
    assert UNUSED not in order
    return order, torch.rand(T, CHOICES, generator=generator, dtype=torch.float64)


def routed_experts(gate: str, other_pairs: str) -> RoutedFFN:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    banks = [
        BankFFN(
            kind, owners, draw(sum(own), D), draw(D, sum(own)), draw(sum(own), D), experts=own
        ).requires_grad_(kind != "frozen")
        for kind, owners, own in BANKS
    ]
    router = None if gate == "none" else Gate(draw(4, D), draw(4), draw(1, 4) * 0.3, draw(1) * 0.3)
    options = {"gate": gate, "gate_init": "preserve", "gate_eval": "soft", "other_pairs": other_pairs}
    return RoutedFFN(1, banks, nn.SiLU(), None, router, options, PAIRS)


def of_expert(whole: RoutedFFN, expert: int, router: nn.Module | None) -> RoutedFFN:
    """A plain routed FFN of one expert's neurons, whose gradients go to the very parameters of the whole."""
    banks = []
    for bank, (kind, owners, own) in zip(whole.banks, BANKS, strict=True):
        begin, end = list(pairwise(accumulate(own, initial=0)))[expert]
        part = BankFFN(kind, owners, torch.empty(end - begin, D), torch.empty(D, end - begin))
        for role, dim in (("up", 0), ("gate", 0), ("down", 1)):
            delattr(part, role)
            setattr(part, role, bank.get_parameter(role).narrow(dim, begin, end - begin))
        banks.append(part)
    return RoutedFFN(1, banks, nn.SiLU(), None, router, whole.options, PAIRS)  # type: ignore[arg-type]


@pytest.mark.parametrize("gate", ["none", "input", "output"])
@pytest.mark.parametrize("other_pairs", ["keep", "mask"])
def test_banks_of_experts_are_banks_of_each_expert(gate: str, other_pairs: str) -> None:
    experts, weights = chosen()
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(T, D, generator=generator, dtype=torch.float64)
    out_grad = torch.randn(T, D, generator=generator, dtype=torch.float64)
    pair_ids = torch.tensor([0, 1, 2, -1, 0, 1, 2, 0, 1, 2, -1])
    keys = torch.arange(T) + 100

    def run(by_hand: bool) -> dict[str, torch.Tensor]:
        ffn = routed_experts(gate, other_pairs).train()
        inputs, own = x.clone().requires_grad_(), weights.clone().requires_grad_()
        values: list[torch.Tensor] = []
        if by_hand:
            output = torch.zeros(T, D, dtype=torch.float64)
            for expert in range(EXPERTS):
                plain = of_expert(ffn, expert, ffn.router).train()
                for choice in range(CHOICES):
                    tokens = torch.nonzero(experts[:, choice] == expert).squeeze(1)
                    if not len(tokens):
                        continue
                    with routed(Routing(pair_ids[tokens], keys[tokens], 0.5)):
                        part = plain(inputs[tokens])
                    output = output.index_add(0, tokens, part * own[tokens, choice, None])
        else:
            with routed(Routing(pair_ids, keys, 0.5), values.append):
                output = ffn(inputs, experts, own)
            assert [value.shape for value in values] == ([] if gate == "none" else [(T, 1)])
        output.backward(out_grad)
        assert inputs.grad is not None
        assert own.grad is not None
        grads = {name: p.grad for name, p in ffn.named_parameters() if p.grad is not None}
        return {"output": output.detach(), "x": inputs.grad, "weights": own.grad, **grads}

    actual, expected = run(by_hand=False), run(by_hand=True)
    assert actual.keys() == expected.keys()
    assert len(actual) > 9
    for name, value in expected.items():
        # Gates are float32, and added up in another order.
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-6, msg=name)
    begin = sum(BANKS[0][2][:UNUSED])
    assert not actual["banks.0.up"][begin:].any(), "no token came to that expert"
    assert actual["banks.0.up"][:begin].any()


def test_no_tokens_and_a_single_one() -> None:
    ffn = routed_experts("input", "keep")
    for tokens in (0, 1):
        x = torch.randn(tokens, D, dtype=torch.float64, requires_grad=True)
        with routed(Routing(torch.tensor(0))):
            out = ffn(x, *(values[:tokens] for values in chosen()))
        out.sum().backward()
        assert out.shape == (tokens, D)
        assert all(p.grad is not None for p in ffn.parameters() if p.requires_grad)


def test_rows_are_sorted_by_expert_and_then_by_token() -> None:
    dispatch = Dispatch.of(torch.tensor([[2, 0], [0, 1], [2, 1]]), 4)
    assert dispatch.tokens.tolist() == [0, 1, 1, 2, 0, 2]
    assert dispatch.counts == (2, 2, 2, 0)
    assert [expert for expert, _ in dispatch.rows()] == [0, 1, 2]


@pytest.mark.parametrize("case", CASES)
def test_statistics_are_those_of_plain_autograd(case: str) -> None:
    """By hand with experts of three dimensions, on two packed examples and padding."""
    model, family = laid_out(case).requires_grad_(False), family_of(tiny_model(case).config.model_type)
    ids, pairs = torch.cat(list(examples())[:2])[None], torch.tensor([0] * 8 + [-1] + [1] * 3)
    seen: list[tuple[torch.Tensor, Dispatch]] = []

    def keep(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        inputs[0].retain_grad()
        seen.append(inputs)

    downs = family.down_projections(model)
    hooks = [down.register_forward_pre_hook(keep) for down in downs]
    model.get_input_embeddings().requires_grad_(True)
    with StatisticsCollector(dict(enumerate(downs)), len(downs), 2, torch.device("cpu")) as collector:
        collector.set_pairs(pairs)
        model(ids).logits.square().sum().backward()
    for hook in hooks:
        hook.remove()
    experts = downs[0].experts
    assert isinstance(experts, int)
    for layer, (h, dispatch) in enumerate(seen):
        f, grad = h.shape[1], h.grad
        assert grad is not None
        whole = torch.zeros(2, len(pairs), experts * f)
        row = 0
        for expert, count in enumerate(dispatch.counts):
            for token in dispatch.tokens[row : row + count].tolist():
                columns = slice(expert * f, (expert + 1) * f)
                whole[0, token, columns], whole[1, token, columns] = h[row].detach(), grad[row]
                row += 1
        for pair in (0, 1):
            own, g = whole[:, pairs == pair].double()
            expected = (own, own.abs(), own > 0, (g * own).abs(), (g * own).square())
            for number, name in enumerate(STATISTICS):
                value = collector._sums[number, pair, layer]
                torch.testing.assert_close(
                    value, expected[number].double().sum(0), rtol=1e-4, atol=1e-5, msg=name
                )


@pytest.mark.parametrize("method", ["lora", "shira", "full", "layers"])
def test_what_other_methods_train(method: str, tmp_path: Path) -> None:
    """Adapters are of single projections: experts get none."""
    base = save(tiny_model("qwen3-moe"), tmp_path / "base")
    recipe = recipe_for(base, tmp_path / "run", method)
    model, family = build(recipe.model)
    selection = None
    if method == "layers":
        from support.selections import random_selection

        selection = random_selection(family.neurons(model), (1,), recipe.data.pairs)
    prepare_model(model, family, recipe, selection)
    mark_trained(model, family, recipe.train, selection)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert any(".experts." in name for name in trained) == (method in ("full", "layers"))


def test_a_base_that_lacks_an_expert_is_refused(tmp_path: Path) -> None:
    base = save(tiny_model("mixtral-moe"), tmp_path)
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.2.w2.weight"]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    model, family = build(ModelConfig(str(base), dtype="float32"))
    with pytest.raises(ModelError, match=r"experts\.0\.w2\.weight|experts\.down_proj\.weight.*shape"):
        fill(model, family, BaseWeights(base), lambda unit: None)


def test_layers_of_several_kinds_are_refused(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, mlp_only_layers=[1])
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"layer 1 has no mlp\.experts\.up_proj.*mlp_only_layers"):
        build(ModelConfig(str(tmp_path)))


def test_a_quantised_mixture_is_refused(tmp_path: Path) -> None:
    base = save(tiny_model("mixtral-moe"), tmp_path)
    with pytest.raises(ModelError, match=r"model\.quantize: nf4 is not supported for mixtures.*mixtral"):
        build(ModelConfig(str(base), quantize="nf4"))


def test_jitter_is_switched_off(tmp_path: Path) -> None:
    base = save(tiny_model("mixtral-moe"), tmp_path)
    assert json.loads((base / "config.json").read_text())["router_jitter_noise"] > 0
    model, _ = build(ModelConfig(str(base), dtype="float32"))
    assert model.config.router_jitter_noise == 0
    assert any(isinstance(module, Experts) for module in model.modules())
