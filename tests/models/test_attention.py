"""The two ways to compute packed attention agree, with each other and with attention written out per token."""

import pytest
import torch

from lander_ds.models import attention

LENGTHS = (5, 1, 9)


def by_hand(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, window: int | None
) -> torch.Tensor:
    """One token at a time: softmax over what it sees in its own example."""
    outputs, start = [], 0
    repeats = q.shape[1] // k.shape[1]
    for length in LENGTHS:
        for token in range(start, start + length):
            first = start if window is None else max(start, token - window + 1)
            for head in range(q.shape[1]):
                keys, values = (x[0, head // repeats, first : token + 1] for x in (k, v))
                weights = torch.softmax(keys @ q[0, head, token] * scaling, 0)
                outputs.append(weights @ values)
        start += length
    return torch.stack(outputs).view(1, start, q.shape[1], -1)


@pytest.mark.parametrize("explicit_length", [0, 512], ids=["fused", "explicit"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=["mha", "gqa", "mqa"])
def test_both_ways_equal_attention_by_hand(
    monkeypatch: pytest.MonkeyPatch, explicit_length: int, window: int | None, heads: tuple[int, int]
) -> None:
    monkeypatch.setattr(attention, "CPU_EXPLICIT_LENGTH", explicit_length)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, count, sum(LENGTHS), 8) for count in (heads[0], heads[1], heads[1]))
    actual, _ = attention.packed_attention(
        torch.nn.Module(), q, k, v, None, scaling=0.3, segment_lengths=LENGTHS, sliding_window=window
    )
    torch.testing.assert_close(actual, by_hand(q, k, v, 0.3, window), atol=1e-5, rtol=1e-5)


def test_no_gradient_crosses_examples() -> None:
    q = torch.randn(1, 2, sum(LENGTHS), 8, requires_grad=True)
    k, v = (torch.randn(1, 2, sum(LENGTHS), 8, requires_grad=True) for _ in range(2))
    actual, _ = attention.packed_attention(torch.nn.Module(), q, k, v, None, segment_lengths=LENGTHS)
    actual[0, : LENGTHS[0]].sum().backward()
    assert k.grad is not None
    assert v.grad is not None
    assert k.grad[0, :, LENGTHS[0] :].abs().max() == 0
    assert v.grad[0, :, : LENGTHS[0]].abs().max() > 0
