"""Tensors of the model that lie on disk in pieces: the projections of a mixture's experts, one expert each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lander_ds.export.sources import TensorSource
from lander_ds.models.surgery import Slice
from lander_ds.models.weights import Piece


@dataclass(frozen=True)
class Share:
    """What of a parameter stands in a tensor on disk."""

    stored: str
    """Its name there."""
    cut: Slice
    """Where in it."""
    inside: torch.Tensor | None
    """[m] int64: which of the parameter's neurons; None for all."""

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """The parameter's values that stand there."""
        return values if self.inside is None else values.index_select(self.cut.dim or 0, self.inside)


def shares(cut: Slice, stored: str, pieces: Sequence[Piece]) -> Iterator[Share]:
    """Where the values of a parameter stand on disk.

    Args:
        cut: where they stand in the model's tensor.
        stored: name of that on disk,
        pieces: or what it consists of there.
    """
    if not pieces:
        yield Share(stored, cut, None)
    for piece in pieces:
        inside = torch.nonzero((cut.neurons >= piece.begin) & (cut.neurons < piece.end)).squeeze(1)
        if len(inside):
            shape = list(cut.shape)
            shape[piece.dim] = piece.end - piece.begin
            own = Slice(piece.name, piece.dim, cut.neurons[inside] - piece.begin, torch.Size(shape))
            yield Share(piece.name, own, inside)


def whole(source: TensorSource, stored: str, dtype: torch.dtype | None) -> torch.Tensor:
    """A tensor of the model by its name on disk, put together from its pieces there."""
    pieces = source.weights.pieces(stored)
    if not pieces:
        return source.tensor(stored, dtype)
    return torch.cat([source.tensor(piece.name, dtype) for piece in pieces], pieces[0].dim)
