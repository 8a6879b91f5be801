"""Relevance of decoder layers: how much the FFN activation changes from a layer to the next."""

from __future__ import annotations

import torch

from lander_ds.method.awareness import Awareness


def relevance(awareness: Awareness) -> torch.Tensor:
    """D[m, i] = mean over neurons of |mean_n A[i] - mean_n A[i + 1]| (P, eq. 1; reduction to a scalar: I).

    A[i] is the inner activation of layer i, averaged over tokens and passes first. The difference between
    layers i and i + 1 belongs to layer i, as in eq. 1, so the last layer has none and cannot be chosen by
    relevance.

    Returns:
        [M, L - 1] float64.
    """
    mean = awareness.activation_mean()
    return (mean[:, :-1] - mean[:, 1:]).abs().mean(-1)
