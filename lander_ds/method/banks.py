"""Which pairs own each neuron of one layer: pure functions of its awareness.

Shapes: M pairs (those that selected the layer), f neurons. Owners are a bool tensor [M, f]: a neuron that all
pairs own is general, one that some own specific, one that none owns frozen.
"""

from __future__ import annotations

import math

import torch

from lander_ds.config.schema.method import BankChoice

ROUNDING = 1e-12
"""Relative size below which a difference between pairs is rounding, not a preference."""


def assign_owners(phi: torch.Tensor, probability: torch.Tensor, choice: BankChoice) -> torch.Tensor:
    """Owners [M, f] of one layer's neurons.

    First the `min_awareness` quantile with the least awareness (sum over pairs of the normalised awareness,
    I) goes to the frozen bank, then the criterion divides the others, `rho` counting only these (I). A single
    pair owns every neuron that is not frozen. `top` looks at all layers together, see `top_owners`.

    Args:
        phi: [M, f] awareness.
        probability: [M, f] activation probability.
        choice: the recipe's `select.banks`, whose ranges its type has checked.
    """
    share = normalise(phi)
    kept = _all_but_least(share.sum(0), choice.min_awareness)
    owners = torch.zeros_like(phi, dtype=torch.bool)
    if len(phi) == 1:
        owners[:, kept] = True
    elif choice.criterion == "ratio":
        owners[:, kept] = ratio_owners(share[:, kept], choice.rho, choice.kappa)
    elif choice.criterion == "entropy":
        owners[:, kept] = entropy_owners(probability[:, kept], choice.rho)
    else:
        owners[:, kept] = spread_owners(share[:, kept], choice.rho, relative=choice.spread == "cv")
    return owners


def normalise(phi: torch.Tensor) -> torch.Tensor:
    """X[m, j] = Phi[m, j] / sum_j Phi[m, j] (P): [M, f]; 0 for a pair without any awareness."""
    return torch.nan_to_num(phi / phi.sum(1, keepdim=True))


def spread_owners(share: torch.Tensor, rho: float, relative: bool = False) -> torch.Tensor:
    """Owners [M, f] by the spread over pairs (P; the threshold's index is I).

    s_j = std over m of X[m, j] (population standard deviation; with `relative` divided by the mean, and 0 for
    a neuron without awareness). The threshold is sorted(s)[floor(rho f)], or the largest s where that index
    is f. s_j <= threshold: general, ties included. Otherwise specific to the pair with the largest X (the
    first of equals).
    """
    mean = share.mean(0)
    spread = share.std(0, correction=0)
    spread[spread <= ROUNDING * mean] = 0.0
    if relative:
        spread = torch.nan_to_num(spread / mean)
    neurons = share.shape[1]
    threshold = spread.sort().values[min(_count(rho, neurons), neurons - 1)]
    return (spread <= threshold) | _one_hot_argmax(share)


def ratio_owners(share: torch.Tensor, rho: float, kappa: float) -> torch.Tensor:
    """Owners [M, f] by importance (R, Xie et al. 2021).

    The floor(rho f) neurons with the largest sum over m of X are general (the lower index first among
    equals). Each of the others belongs to every pair with X[m, j] > kappa max_m X[m, j], and always to the
    pair with the largest: to all pairs (then it is general too), some, or none where X is 0 for all.
    """
    largest = share.max(0).values
    owners = ((share > kappa * largest) | (share == largest)) & (largest > 0)
    ranked = torch.sort(share.sum(0), descending=True, stable=True).indices
    owners[:, ranked[: _count(rho, share.shape[1])]] = True
    return owners


def entropy_owners(probability: torch.Tensor, rho: float) -> torch.Tensor:
    """Owners [M, f] by the entropy of the activation probability over pairs (R, LAPE, Tang et al. 2024).

    With p normalised over m, the f - floor(rho f) neurons of lowest entropy (the lower index first among
    equals) are specific to the pair with the largest p (the first of equals), the others general. A neuron
    that prefers no pair, p = 0 for all included, is never specific: in a gated FFN h may be negative
    everywhere and yet matter (I).
    """
    pairs, neurons = probability.shape
    total = probability.sum(0)
    distribution = torch.where(total > 0, probability / total, 1.0 / pairs)
    entropy = torch.special.entr(distribution).sum(0)
    ranked = torch.sort(entropy, stable=True).indices
    general = torch.ones(neurons, dtype=torch.bool)
    general[ranked[: neurons - _count(rho, neurons)]] = False
    general |= entropy >= math.log(pairs) * (1.0 - ROUNDING)
    return general | _one_hot_argmax(probability)


def top_owners(phi: torch.Tensor, takes_part: torch.Tensor, share: float, quorum: float) -> torch.Tensor:
    """Owners [M, K, f] by the share of the total awareness over K layers together (I).

    A pair's top are the floor(share N) neurons with the largest Phi among the N neurons of the layers that it takes part
    in (the lower layer and index first among equals; never one without awareness). A neuron in the top of at least
    ceil(quorum V), and of at least 2, of the V pairs that take part in its layer is owned by all V; one in the top of
    fewer by these; the others by none.

    Args:
        phi: [M, K, f] awareness.
        takes_part: [M, K] bool.
        share: of the neurons, above 0.
        quorum: share of the pairs, above 0.
    """
    owners = torch.zeros_like(phi, dtype=torch.bool)
    neurons = phi.shape[2]
    for own, aware, here in zip(owners, phi, takes_part, strict=True):
        values = torch.where(here[:, None], aware, 0.0).flatten()
        count = _count(share, int(here.sum()) * neurons)
        top = torch.sort(values, descending=True, stable=True).indices[:count]
        own.view(-1)[top[values[top] > 0]] = True
    pairs = takes_part.sum(0)
    needed = torch.ceil(quorum * pairs - 1e-9).clamp(min=2)
    general = owners.sum(0) >= needed[:, None]
    return owners | (general & takes_part[:, :, None])


def _all_but_least(awareness: torch.Tensor, quantile: float) -> torch.Tensor:
    """Indices of the neurons left when the floor(quantile f) least aware go, the lower index first."""
    return torch.sort(awareness, stable=True).indices[_count(quantile, len(awareness)) :].sort().values


def _one_hot_argmax(values: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(values, dtype=torch.bool).scatter_(0, values.argmax(0, keepdim=True), True)


def _count(share: float, neurons: int) -> int:
    # 0.29 * 100 is 28.999999999999996: without the small addition a neuron would be lost.
    return math.floor(share * neurons + 1e-9)
