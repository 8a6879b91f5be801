"""Packed micro-batches: many examples in one row of tokens, no padding, no attention across examples.

Shapes: T tokens, E examples, N target tokens in the micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Example:
    """One tokenised sentence pair."""

    input_ids: np.ndarray
    """[length] int32: prompt, target, end of sequence."""
    prompt_length: int
    """Tokens before the target; they carry no loss."""
    pair_id: int
    """Position of the language pair in the recipe."""
    sample_id: int
    """Global sample index: the same for every number of ranks. Keys the gate noise."""
    rejected: bool = False
    """Whether it is the worse translation of the example before it."""


@dataclass(frozen=True)
class PackedBatch:
    """A micro-batch. Every tensor but the lengths lives on one device."""

    input_ids: torch.Tensor
    """[T] int64."""
    positions: torch.Tensor
    """[T] int64, from 0 in every example."""
    pair_ids: torch.Tensor
    """[T] int64."""
    segment_ids: torch.Tensor
    """[T] int64: number of the example in this micro-batch."""
    segment_lengths: tuple[int, ...]
    """E lengths that sum to T."""
    sample_ids: torch.Tensor
    """[E] int64."""
    target_positions: torch.Tensor
    """[N] int64: t such that the logits at t predict a target token (the one at t + 1)."""
    targets: torch.Tensor
    """[N] int64 token ids."""
    boundaries: torch.Tensor
    """[E + 1] int32: where each example begins, and T."""
    prefix: torch.Tensor | None = None
    """[T, d]: hidden states that come into decoder layer `prefix_layers`, where those below need not be run."""
    prefix_layers: int = 0
    """Decoder layers that `prefix` stands for."""
    preferences: int = 0
    """K: the first 2 K examples are by turns a chosen translation and a rejected one of the same source."""

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)


def pack(examples: Sequence[Example]) -> PackedBatch:
    """Put examples behind one another.

    An example whose prompt is its whole length contributes tokens but no target. Those with a rejected translation come
    first, each followed by it.
    """
    lengths = [len(example.input_ids) for example in examples]
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    input_ids = np.concatenate([example.input_ids for example in examples]).astype(np.int64)
    positions = np.concatenate([np.arange(length, dtype=np.int64) for length in lengths])
    target_positions = np.concatenate(
        [
            # Without a prompt nothing predicts the first token.
            np.arange(start + max(example.prompt_length, 1) - 1, start + length - 1, dtype=np.int64)
            for start, length, example in zip(starts, lengths, examples, strict=True)
        ]
    )
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        positions=torch.from_numpy(positions),
        pair_ids=torch.from_numpy(np.repeat([e.pair_id for e in examples], lengths).astype(np.int64)),
        segment_ids=torch.from_numpy(np.repeat(np.arange(len(examples)), lengths).astype(np.int64)),
        segment_lengths=tuple(lengths),
        sample_ids=torch.tensor([e.sample_id for e in examples], dtype=torch.int64),
        target_positions=torch.from_numpy(target_positions),
        targets=torch.from_numpy(input_ids[target_positions + 1]),
        boundaries=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        preferences=sum(example.rejected for example in examples),
    )
