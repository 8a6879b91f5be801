"""The loss head against torch's cross-entropy: values and gradients, in one chunk and in many."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from lander_ds.models import loss
from lander_ds.models.loss import LossHead

TOKENS, WIDTH, VOCABULARY = 13, 8, 50


def head_of(bias: bool, trained: bool, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias).to(dtype)
    nn.init.normal_(head.weight)
    return head.requires_grad_(trained)


def inputs(tokens: int = TOKENS, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, WIDTH, generator=generator).to(dtype).requires_grad_()
    return hidden, torch.randint(VOCABULARY, (tokens,), generator=generator)


def expected_losses(
    hidden: torch.Tensor, head: nn.Linear, targets: torch.Tensor, softcap: float | None
) -> torch.Tensor:
    logits = functional.linear(
        hidden.float(), head.weight.float(), None if head.bias is None else head.bias.float()
    )
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return functional.cross_entropy(logits, targets, reduction="none")


@pytest.fixture(params=["whole", "chunked"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on real sizes, and with tokens and vocabulary cut into small pieces that do not divide evenly."""
    if request.param == "chunked":
        monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 4 * VOCABULARY)
        monkeypatch.setattr(loss, "CPU_VOCABULARY_BLOCK", 7)
        monkeypatch.setattr(loss, "SOFTMAX_ELEMENTS", 3 * VOCABULARY)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients(bias: bool, softcap: float | None, trained: bool) -> None:
    head = head_of(bias, trained)
    hidden, targets = inputs()
    # Tokens of unequal weight, so that the gradient of each has to be right by itself.
    weights = torch.linspace(0.1, 2.0, TOKENS)
    actual = LossHead(head, softcap)(hidden, targets)
    leaves = [hidden, *(p for p in head.parameters() if trained)]
    actual_gradients = torch.autograd.grad((actual * weights).sum(), leaves)
    expected = expected_losses(hidden, head, targets, softcap)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), leaves)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected)
    for one, other in zip(actual_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_bfloat16(softcap: float | None) -> None:
    head = head_of(True, False, torch.bfloat16)
    hidden, targets = inputs(dtype=torch.bfloat16)
    actual = LossHead(head, softcap)(hidden, targets)
    [gradient] = torch.autograd.grad(actual.sum(), [hidden])
    expected = expected_losses(hidden, head, targets, softcap)
    [expected_gradient] = torch.autograd.grad(expected.sum(), [hidden])
    assert (actual.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(actual, expected, atol=0.05, rtol=0.02)
    torch.testing.assert_close(gradient, expected_gradient, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("trained", [False, True])
def test_no_target_at_all(trained: bool) -> None:
    head = head_of(False, trained)
    hidden, targets = inputs(0)
    actual = LossHead(head, None)(hidden, targets)
    assert actual.shape == (0,)
    assert actual.sum().item() == 0.0
    [gradient] = torch.autograd.grad(actual.sum(), [hidden])
    assert gradient.shape == hidden.shape


def test_without_gradients_the_losses_are_the_same() -> None:
    head = head_of(True, False)
    hidden, targets = inputs()
    with torch.no_grad():
        actual = LossHead(head, 1.5)(hidden, targets)
    assert not actual.requires_grad
    torch.testing.assert_close(actual, expected_losses(hidden, head, targets, 1.5).detach())


def test_the_inputs_are_not_overwritten() -> None:
    head = head_of(True, False)
    hidden, targets = inputs()
    before = hidden.detach().clone()
    LossHead(head, 1.5)(hidden, targets).sum().backward()
    assert torch.equal(hidden, before)


def test_a_frozen_head_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 4 * VOCABULARY)
    sizes: list[int] = []
    original = loss._logits

    def watched(hidden: torch.Tensor, *rest: torch.Tensor | None) -> torch.Tensor:
        logits = original(hidden, *rest)  # type: ignore[arg-type]
        sizes.append(logits.numel())
        return logits

    monkeypatch.setattr(loss, "_logits", watched)
    hidden, targets = inputs()
    LossHead(head_of(False, False), None)(hidden, targets)
    assert max(sizes) <= 4 * VOCABULARY
    assert sum(sizes) == TOKENS * VOCABULARY
