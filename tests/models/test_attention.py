"""The ways to compute packed attention agree, with each other and with attention written out per token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.segments import segments_of

from lander_ds.models import attention

LENGTHS = (5, 1, 9)


def by_hand(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float,
    window: int | None,
    slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """One token at a time: softmax over what it sees in its own example."""
    outputs, start = [], 0
    repeats = q.shape[1] // k.shape[1]
    for length in LENGTHS:
        for token in range(start, start + length):
            first = start if window is None else max(start, token - window + 1)
            for head in range(q.shape[1]):
                keys, values = (x[0, head // repeats, first : token + 1] for x in (k, v))
                scores = keys @ q[0, head, token] * scaling
                if slopes is not None:
                    scores = scores + slopes[head] * torch.arange(first - start, token + 1 - start)
                weights = torch.softmax(scores, 0)
                outputs.append(weights @ values)
        start += length
    return torch.stack(outputs).view(1, start, q.shape[1], -1)


WAYS = ("fused", "explicit", "classes", "one kernel")


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every way on this CPU; the kernel for different lengths, which only GPUs have, by what its documentation says."""
    monkeypatch.setattr(attention, "CPU_EXPLICIT_LENGTH", 512 if request.param == "explicit" else 0)
    monkeypatch.setattr(attention, "SHORTEST_CLASS", 2)
    if request.param == "classes":
        monkeypatch.setattr(attention, "_one_by_one", attention._by_class)
    if request.param == "one kernel":
        monkeypatch.setattr(attention, "_one_by_one", attention._of_different_lengths)
        monkeypatch.setattr(attention, "varlen_attn", documented_varlen)
    return str(request.param)


def documented_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts_q: torch.Tensor,
    starts_k: torch.Tensor,
    longest_q: int,
    longest_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """torch.nn.attention.varlen.varlen_attn on [T, heads, width], a token seeing window_size to its left and right."""
    assert starts_q.dtype == torch.int32
    assert longest_q == longest_k == int(starts_q.diff().max())
    assert enable_gqa == (q.shape[1] != k.shape[1])
    left, right = window_size
    assert right == 0
    outputs = []
    for start, end in zip(starts_q[:-1].tolist(), starts_k[1:].tolist(), strict=True):
        steps = torch.arange(end - start)
        distance = steps[:, None] - steps[None, :]
        seen = (distance >= 0) & (distance <= (left if left >= 0 else end))
        keys, values = (x[start:end].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = torch.einsum("qhw,khw->hqk", q[start:end], keys) * scale
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khw->qhw", weights, values))
    return torch.cat(outputs)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    segments = segments_of(LENGTHS)
    return attention.packed_attention(torch.nn.Module(), q, k, v, None, segments=segments, **options)[0]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=["mha", "gqa", "mqa"])
def test_every_way_equals_attention_by_hand(way: str, window: int | None, heads: tuple[int, int]) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, count, sum(LENGTHS), 8) for count in (heads[0], heads[1], heads[1]))
    actual = attend(q, k, v, scaling=0.3, sliding_window=window)
    torch.testing.assert_close(actual, by_hand(q, k, v, 0.3, window), atol=1e-5, rtol=1e-5)


SLOPES = torch.tensor([0.5, 0.25, 0.1, 2.0])


@pytest.mark.parametrize("by_class", [False, True])
def test_alibi_is_attention_by_hand(monkeypatch: pytest.MonkeyPatch, by_class: bool) -> None:
    monkeypatch.setattr(attention, "SHORTEST_CLASS", 2)
    # No kernel knows it, however long examples are.
    monkeypatch.setattr(attention, "CPU_EXPLICIT_LENGTH", 0)
    if by_class:
        monkeypatch.setattr(attention, "_one_by_one", attention._by_class)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, sum(LENGTHS), 8) for _ in range(3))
    actual = attend(q, k, v, scaling=0.3, slopes=SLOPES)
    torch.testing.assert_close(actual, by_hand(q, k, v, 0.3, None, SLOPES), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"sliding_window": 3}, {"softcap": 0.7, "sliding_window": 3}, {"slopes": SLOPES}],
    ids=",".join,
)
def test_batches_of_examples_have_the_gradients_of_single_ones(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(attention, "SHORTEST_CLASS", 8)
    torch.manual_seed(0)
    results = []
    whole = [torch.randn(1, heads, sum(LENGTHS), 8) for heads in (4, 2, 2)]
    weights = torch.randn(1, sum(LENGTHS), 4, 8)
    for function in (attention._one_by_one, attention._by_class):
        monkeypatch.setattr(attention, "_one_by_one", function)
        inputs = [tensor.clone().requires_grad_() for tensor in whole]
        output = attend(*inputs, **options)
        results.append((output, *torch.autograd.grad((output * weights).sum(), inputs)))
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)


def test_no_gradient_crosses_examples(way: str) -> None:
    q = torch.randn(1, 2, sum(LENGTHS), 8, requires_grad=True)
    k, v = (torch.randn(1, 2, sum(LENGTHS), 8, requires_grad=True) for _ in range(2))
    actual = attend(q, k, v, scaling=1.0)
    actual[0, : LENGTHS[0]].sum().backward()
    assert k.grad is not None
    assert v.grad is not None
    assert k.grad[0, :, LENGTHS[0] :].abs().max() == 0
    assert v.grad[0, :, : LENGTHS[0]].abs().max() > 0


def test_examples_of_like_lengths_are_one_class() -> None:
    classes, order = segments_of((3, 40, 16, 33, 17)).classes
    assert [tuple(tokens.shape) for tokens in classes] == [(2, 16), (1, 17), (2, 40)]
    flat = torch.cat([tokens.flatten() for tokens in classes])
    assert torch.equal(flat[order], torch.arange(3 + 40 + 16 + 33 + 17))
    # Padded with the last token of the example.
    assert classes[0][0].tolist() == [0, 1, *[2] * 14]
