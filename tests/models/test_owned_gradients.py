"""Weight gradients come from the tokens whose pair owns the bank; activation gradients from all."""

from __future__ import annotations

import pytest
import torch
from support.small_ffn import PAIRS, bank_by_hand, run, small_ffn, tokens, whole_by_hand

from lander_ds.models.routed_ffn import BankFFN, RoutedFFN, Routing, routed


def gradients(
    ffn: RoutedFFN, x: torch.Tensor, pair_ids: torch.Tensor, out_grad: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(parameter name -> gradient, gradient of x)."""
    ffn.zero_grad(set_to_none=True)
    inputs = x.clone().requires_grad_()
    run(ffn, inputs, pair_ids).backward(out_grad)
    assert inputs.grad is not None
    actual = {name: p.grad for name, p in ffn.named_parameters() if p.grad is not None}
    return actual, inputs.grad


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("gate", ["none", "input", "output"])
@pytest.mark.parametrize("other_pairs", ["keep", "mask"])
def test_a_mixed_batch_is_the_sum_of_its_single_pair_batches(
    gated: bool, gate: str, other_pairs: str
) -> None:
    ffn = small_ffn(gated, gate, other_pairs=other_pairs)
    x, pair_ids = tokens()
    out_grad = torch.randn_like(x)
    mixed, mixed_x = gradients(ffn, x, pair_ids, out_grad)
    assert set(mixed) == {name for name, p in ffn.named_parameters() if p.requires_grad}
    summed = {name: torch.zeros_like(value) for name, value in mixed.items()}
    for pair in range(len(PAIRS)):
        of_pair = pair_ids == pair
        single, single_x = gradients(ffn, x[of_pair], torch.tensor(pair), out_grad[of_pair])
        assert set(single) == set(mixed)
        for name, value in single.items():
            summed[name] += value
        torch.testing.assert_close(single_x, mixed_x[of_pair])
    for name, value in mixed.items():
        torch.testing.assert_close(value, summed[name], msg=name)


@pytest.mark.parametrize("gated", [True, False])
def test_tokens_of_other_pairs_send_a_bank_exactly_nothing(gated: bool) -> None:
    ffn = small_ffn(gated)
    x, _ = tokens()
    for pair in range(len(PAIRS)):
        actual, _ = gradients(ffn, x, torch.tensor(pair), torch.ones_like(x))
        for number, bank in enumerate(ffn.banks):
            assert isinstance(bank, BankFFN)
            for role, parameter in bank.named_parameters():
                name = f"banks.{number}.{role}"
                if not parameter.requires_grad:
                    assert name not in actual
                elif pair in bank.owners:
                    assert actual[name].abs().max() > 0, name
                else:
                    # Zero, not missing: every rank must reduce the same gradients.
                    assert actual[name].abs().max() == 0, name


@pytest.mark.parametrize("gated", [True, False])
def test_activation_gradients_are_the_plain_ffns(gated: bool) -> None:
    ffn = small_ffn(gated, "none")
    x, pair_ids = tokens()
    out_grad = torch.randn_like(x)
    _, actual = gradients(ffn, x, pair_ids, out_grad)
    inputs = x.clone().requires_grad_()
    whole_by_hand(ffn, inputs).backward(out_grad)
    assert inputs.grad is not None
    torch.testing.assert_close(actual, inputs.grad)


@pytest.mark.parametrize("gated", [True, False])
def test_owned_gradients_are_those_of_autograd_on_the_owners_tokens(gated: bool) -> None:
    ffn = small_ffn(gated, "none")
    x, pair_ids = tokens()
    actual, _ = gradients(ffn, x, pair_ids, torch.ones_like(x))
    for number, bank in enumerate(ffn.banks):
        assert isinstance(bank, BankFFN)
        if bank.kind == "frozen":
            continue
        own = x[torch.isin(pair_ids, torch.tensor(bank.owners))]
        names = [role for role, _ in bank.named_parameters()]
        expected = torch.autograd.grad(bank_by_hand(bank, own).sum(), list(bank.parameters()))
        for role, value in zip(names, expected, strict=True):
            torch.testing.assert_close(actual[f"banks.{number}.{role}"], value)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("gate", ["none", "input", "output"])
def test_gradcheck_where_every_token_owns_every_trained_bank(gated: bool, gate: str) -> None:
    banks = (("general", (0, 1, 2), 3), ("specific", (0,), 2), ("frozen", (), 2))
    ffn = small_ffn(gated, gate, banks=banks)
    x, _ = tokens(3)
    trained = [
        name for name, p in ffn.named_parameters() if p.requires_grad and not name.startswith("router.")
    ]
    values = [dict(ffn.named_parameters())[name].detach().clone().requires_grad_() for name in trained]
    # The gate computes its logits in float32, too coarse for finite differences through it.
    if ffn.router is not None:
        ffn.router.requires_grad_(False)
        ffn.router.w1.data.zero_()

    def call(inputs: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        with routed(Routing(torch.tensor(0))):
            return torch.func.functional_call(ffn, dict(zip(trained, parameters, strict=True)), (inputs,))

    torch.autograd.gradcheck(call, (x.requires_grad_(), *values), atol=1e-4)


def test_the_gate_learns_from_every_pairs_tokens() -> None:
    ffn = small_ffn()
    x, _ = tokens()
    for pair in range(len(PAIRS)):
        actual, _ = gradients(ffn, x, torch.tensor(pair), torch.ones_like(x))
        assert actual["router.w1"].abs().max() > 0


def test_only_trained_banks_keep_their_input() -> None:
    """Frozen banks must not pay memory or time for weight gradients."""
    ffn = small_ffn(gate="none")
    x, pair_ids = tokens()
    saved: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.data_ptr())
        return tensor

    inputs = x.clone().requires_grad_()
    ffn.requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run(ffn, inputs, pair_ids)
    assert inputs.data_ptr() not in saved
    out.sum().backward()
    assert all(parameter.grad is None for parameter in ffn.parameters())
