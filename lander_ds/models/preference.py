"""Contrastive preference optimisation (R, CPO: Xu et al. 2024): a better and a worse translation of every source.

Shapes: N target tokens, E segments and K preferences of a micro-batch, M pairs. The first 2 K segments are chosen and
rejected translations by turns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from lander_ds.data.batching.packing import PackedBatch

FIGURES = 4
"""Rows that a preference adds to the sums per pair."""


@dataclass(frozen=True)
class Preference:
    """Per example -log sigmoid(beta (log p(chosen) - log p(rejected))), log p summed over target tokens; besides, the
    likelihood of what is chosen. No reference model is asked."""

    beta: float
    """How much a difference counts."""
    likelihood: float
    """Weight of the mean loss of the chosen translations' tokens."""


@dataclass(frozen=True)
class Contrast:
    """What a micro-batch says of its preferences."""

    losses: torch.Tensor
    """[K] nats, with gradients."""
    sums: torch.Tensor
    """[4, M + 1] float64: losses, how often the chosen translation is the likelier one, margins
    log p(chosen) - log p(rejected), number of preferences; per pair."""
    of_rejected: torch.Tensor
    """[N] bool: target tokens of rejected translations."""


def contrast(losses: torch.Tensor, batch: PackedBatch, beta: float, pairs: int) -> Contrast:
    """Compare the two translations of every source.

    Args:
        losses: [N] of the target tokens, in nats.
        batch: the micro-batch.
        beta: of `Preference`.
        pairs: M.
    """
    count = 2 * batch.preferences
    segments = batch.segment_ids[batch.target_positions]
    of_segments = losses.new_zeros(len(batch.segment_lengths)).index_add(0, segments, losses)
    chosen, rejected = of_segments[:count].view(-1, 2).unbind(1)
    margins = rejected - chosen
    preference_losses = -functional.logsigmoid(beta * margins)
    owners = batch.pair_ids[batch.boundaries[:count:2].long()] % (pairs + 1)
    rows = torch.stack(
        [
            preference_losses.detach(),
            (margins > 0).to(losses.dtype),
            margins.detach(),
            torch.ones_like(margins),
        ]
    )
    sums = torch.zeros(FIGURES, pairs + 1, dtype=torch.float64, device=losses.device)
    sums.index_add_(1, owners, rows.double())
    return Contrast(preference_losses, sums, (segments < count) & (segments % 2 == 1))
