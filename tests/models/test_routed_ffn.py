"""The routed FFN's forward against the formulas of the method, written out token by token."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support.small_ffn import BANKS, PAIRS, D, bank_by_hand, c_by_hand, run, small_ffn, tokens, whole_by_hand
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lander_ds.models.routed_ffn import BankFFN, Gate, RoutedFFN, Routing, carrying, routed


def by_hand(ffn: RoutedFFN, x: torch.Tensor, pair_ids: torch.Tensor) -> torch.Tensor:
    """out = FFN_G(c_G x) + FFN_S(m)(c_S x) + FFN_rest(x), one token and one bank at a time."""
    options = ffn.options
    out = torch.zeros_like(x)
    for t in range(len(x)):
        token, pair = x[t : t + 1], int(pair_ids[t])
        c = c_by_hand(ffn, token).item() if ffn.router is not None else None
        for bank in ffn.banks:
            assert isinstance(bank, BankFFN)
            scale = 1.0
            if c is not None and pair in bank.owners:
                factor = 2.0 if options["gate_init"] == "preserve" else 1.0
                scale = factor * (c if bank.kind == "general" else 1.0 - c)
            if bank.kind == "specific" and pair not in bank.owners and options["other_pairs"] == "mask":
                continue
            if options["gate"] == "output":
                out[t] += scale * bank_by_hand(bank, token)[0]
            else:
                out[t] += bank_by_hand(bank, scale * token)[0]
    return out if ffn.output_bias is None else out + ffn.output_bias


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("gate", ["none", "input", "output"])
@pytest.mark.parametrize("gate_init", ["preserve", "paper"])
@pytest.mark.parametrize("other_pairs", ["keep", "mask"])
def test_forward_is_the_formula(gated: bool, gate: str, gate_init: str, other_pairs: str) -> None:
    ffn = small_ffn(gated, gate, gate_init, other_pairs=other_pairs)
    x, pair_ids = tokens()
    torch.testing.assert_close(run(ffn, x, pair_ids), by_hand(ffn, x, pair_ids), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gated", [True, False])
def test_the_banks_sum_to_the_ffn_with_the_output_bias_once(gated: bool) -> None:
    ffn = small_ffn(gated, "none")
    x, pair_ids = tokens()
    torch.testing.assert_close(run(ffn, x, pair_ids), whole_by_hand(ffn, x))


@pytest.mark.parametrize("gated", [True, False])
def test_a_gate_at_its_starting_point_scales_by_exactly_one(gated: bool) -> None:
    ffn, plain = small_ffn(gated, "input"), small_ffn(gated, "none")
    assert ffn.router is not None
    ffn.router.w2.data.zero_()
    ffn.router.b2.data.zero_()
    x, pair_ids = tokens()
    assert torch.equal(run(ffn, x, pair_ids), run(plain, x, pair_ids))


def test_a_general_bank_that_some_pairs_do_not_own_is_unscaled_and_unmasked_for_them() -> None:
    banks = (("general", (0, 1), 5), ("specific", (0,), 3), ("frozen", (), 2))
    ffn = small_ffn(banks=banks, other_pairs="mask")
    x, _ = tokens()
    pair_ids = torch.full((len(x),), 2)
    expected = bank_by_hand(ffn.banks[0], x) + bank_by_hand(ffn.banks[2], x)  # type: ignore[arg-type]
    torch.testing.assert_close(run(ffn, x, pair_ids), expected)


def test_hard_gates_hold_in_evaluation_only() -> None:
    ffn = small_ffn(gate_init="paper", gate_eval="hard")
    x, pair_ids = tokens(30)
    torch.testing.assert_close(run(ffn, x, pair_ids), by_hand(ffn, x, pair_ids), rtol=1e-6, atol=1e-6)
    c = c_by_hand(ffn, x)
    assert 0 < (c >= 0.5).sum() < len(c)
    expected = []
    for t, token in enumerate(x):
        kept = "general" if c[t] >= 0.5 else "specific"
        expected.append(
            sum(
                bank_by_hand(bank, token[None])[0]  # type: ignore[arg-type, misc]
                for bank in ffn.banks
                if int(pair_ids[t]) not in bank.owners or bank.kind == kept  # type: ignore[operator]
            )
        )
    torch.testing.assert_close(run(ffn.eval(), x, pair_ids), torch.stack(expected))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pair_ids", "shape"),
    [
        (torch.tensor(1), (2, 4)),
        (torch.tensor([1]), (1, 8)),
        (torch.tensor([0, 2]), (2, 4)),
        (torch.tensor([[0], [2]]), (2, 4)),
        (torch.tensor([0, 2]), (8,)),  # OPT flattens [B, T]
        (torch.tensor([0, 2]), (2, 1)),  # decoding with a cache
        (torch.tensor([0, 2]), (6, 2)),  # three beams each
        (torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]), (8,)),
        (torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]), (1, 8)),
        (torch.tensor([[0, 1, 2, 0], [1, 2, 0, 1]]), (2, 4)),
    ],
)
def test_forms_of_pair_ids(pair_ids: torch.Tensor, shape: tuple[int, ...]) -> None:
    ffn = small_ffn()
    count = torch.Size(shape).numel()
    x, _ = tokens(count)
    per_token = pair_ids.reshape(-1).repeat_interleave(count // pair_ids.numel())
    actual = run(ffn, x.reshape(*shape, D), pair_ids)
    assert actual.shape == (*shape, D)
    torch.testing.assert_close(actual.reshape(-1, D), by_hand(ffn, x, per_token), rtol=1e-6, atol=1e-6)


def test_one_routing_serves_passes_of_different_length() -> None:
    ffn = small_ffn(other_pairs="mask")
    x, _ = tokens(8)
    with routed(Routing(torch.tensor([0, 1]))):
        whole = ffn(x.reshape(2, 4, D))
        last = ffn(x.reshape(2, 4, D)[:, 3:])
    torch.testing.assert_close(last, whole[:, 3:])


class Copies(TorchDispatchMode):
    """Counts how often tensors are put behind one another."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten.cat.default
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("gated", [True, False])
def test_banks_that_were_joined_are_not_copied_again(gated: bool) -> None:
    ffn, joined = small_ffn(gated), small_ffn(gated)
    joined.join()
    x, pair_ids = tokens()
    for one, other in zip(ffn.parameters(), joined.parameters(), strict=True):
        assert torch.equal(one, other)
    for case, copies in ((ffn, 3), (joined, 0)):
        with Copies() as counted, torch.no_grad():
            output = run(case, x, pair_ids)
        assert counted.count == copies
        torch.testing.assert_close(output, by_hand(ffn, x, pair_ids), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("absent", ["meta", "sharded"])
def test_absent_banks_are_brought_around_the_products(absent: str) -> None:
    """Who offloads or shards weights brings them by hooks on the module that has them, for as long as it runs."""
    ffn = small_ffn()
    x, pair_ids = tokens()
    wanted = run(ffn, x, pair_ids)
    for bank in ffn.banks:
        whole = {name: parameter.data for name, parameter in bank.named_parameters()}

        def take_away(module: nn.Module) -> None:
            for name in list(module._parameters):
                if module._parameters[name] is not None:
                    empty = torch.empty(3, 2, device="meta") if absent == "meta" else torch.empty(0)
                    module._parameters[name] = nn.Parameter(empty)

        def bring(module: nn.Module, *_: Any, whole: dict[str, torch.Tensor] = whole) -> None:
            for name, values in whole.items():
                module._parameters[name] = nn.Parameter(values)

        take_away(bank)
        bank.register_forward_pre_hook(bring)
        bank.register_forward_hook(lambda module, *_: take_away(module))
    assert torch.equal(run(ffn, x, pair_ids), wanted)
    assert not any(bank.present for bank in ffn.banks)


def test_a_missing_pair_is_an_error_that_names_the_pairs() -> None:
    ffn = small_ffn()
    with pytest.raises(RuntimeError, match=f"language pair is not set.*{', '.join(PAIRS)}"):
        ffn(tokens()[0])


def test_a_routing_holds_inside_its_context_and_thread_alone() -> None:
    ffn = small_ffn(other_pairs="mask")
    x, _ = tokens()
    wanted = [run(ffn, x, torch.tensor(pair)) for pair in range(len(PAIRS))]
    with routed(Routing(torch.tensor(0))):
        with routed(Routing(torch.tensor(1))):
            assert torch.equal(ffn(x), wanted[1])
            later = carrying(ffn)
        assert torch.equal(ffn(x), wanted[0])
        with ThreadPoolExecutor(1) as thread:
            with pytest.raises(RuntimeError, match="language pair is not set"):
                thread.submit(ffn, x).result()
            assert torch.equal(thread.submit(later, x).result(), wanted[1])
        assert torch.equal(ffn(x), wanted[0])


def test_pair_ids_that_do_not_fit_are_an_error() -> None:
    ffn = small_ffn()
    with pytest.raises(RuntimeError, match="3 pair ids do not fit 8 tokens"):
        run(ffn, tokens(8)[0], torch.tensor([0, 1, 2]))


def test_padding_owns_no_specific_bank() -> None:
    ffn = small_ffn(other_pairs="mask", gate="none")
    x, _ = tokens(4)
    expected = bank_by_hand(ffn.banks[0], x) + bank_by_hand(ffn.banks[4], x)  # type: ignore[arg-type]
    torch.testing.assert_close(run(ffn, x, torch.tensor(-1)), expected)


def test_bfloat16_stays_bfloat16_and_close() -> None:
    x, pair_ids = tokens()
    results: dict[torch.dtype, Any] = {}
    for dtype in (torch.float64, torch.bfloat16):
        ffn = small_ffn(dtype=dtype)
        out = run(ffn, x.to(dtype), pair_ids)
        out.sum().backward()
        first = ffn.banks[0]
        assert isinstance(first, BankFFN)
        assert isinstance(ffn.router, Gate)
        results[dtype] = (out, first.up.grad, ffn.router.w2.grad)
    for exact, rounded in zip(results[torch.float64], results[torch.bfloat16], strict=True):
        assert rounded.dtype == torch.bfloat16
        assert (rounded.double() - exact).norm() < 0.05 * exact.norm()


def test_the_made_up_ffn_has_every_kind_of_bank() -> None:
    assert {kind for kind, _, _ in BANKS} == {"general", "specific", "frozen"}
    assert any(kind == "specific" and len(owners) > 1 for kind, owners, _ in BANKS)
