"""Identity 7, first half: D on hand-made numbers."""

from __future__ import annotations

import torch
from support.toy import METADATA

from lander_ds.method.awareness import Awareness
from lander_ds.method.relevance import relevance


def from_means(means: torch.Tensor, tokens: list[float]) -> Awareness:
    """An awareness whose mean activations [M, L, f] are `means`."""
    count = torch.tensor(tokens, dtype=torch.float64)
    sums = means.double() * count[:, None, None]
    pairs = tuple(f"en-x{row}" for row in range(len(means)))
    zeros = torch.zeros_like(sums)
    return Awareness(pairs, count, sums, sums.abs(), zeros, zeros, zeros, METADATA)


def test_hand_made() -> None:
    means = torch.tensor(
        [
            [[1.0, -1.0], [2.0, 1.0], [2.0, 1.0]],  # |1-2|, |-1-1| -> 1.5; then no change
            [[0.0, 4.0], [0.0, 0.0], [-3.0, 3.0]],  # 0, 4 -> 2; then 3, 3 -> 3
        ]
    )
    # The number of tokens must not matter: D is made of means.
    assert relevance(from_means(means, [4, 10])).tolist() == [[1.5, 0.0], [2.0, 3.0]]


def test_neurons_do_not_cancel() -> None:
    # Opposite changes of two neurons: the absolute value comes before the mean over neurons.
    assert relevance(from_means(torch.tensor([[[0.0, 0.0], [1.0, -1.0]]]), [1])).item() == 1.0


def test_a_single_layer_has_no_relevance() -> None:
    assert relevance(from_means(torch.ones(2, 1, 3), [1, 1])).shape == (2, 0)
