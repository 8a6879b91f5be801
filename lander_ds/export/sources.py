"""Where exports take their tensors from: a base on disk, and what has changed in it, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Protocol

import torch

from lander_ds.common.errors import ArtefactError
from lander_ds.models.weights import BaseWeights


class Tensors(Protocol):
    """Named tensors that are read one at a time."""

    def __contains__(self, name: str) -> bool: ...

    def read(self, name: str) -> torch.Tensor:
        """The tensor called `name`. It is not to be written into."""


class TensorSource(Protocol):
    """The tensors of a changed model, under the names and in the layout of its base."""

    @property
    def weights(self) -> BaseWeights:
        """The base."""

    def changed(self) -> Set[str]:
        """Names on disk of the tensors that may differ from the base's."""

    def tensor(self, stored: str, dtype: torch.dtype | None) -> torch.Tensor:
        """A tensor by its name on disk, in `dtype` (None: the base's). Tensors that hold no floating-point numbers
        keep their type. It is not to be written into."""


def kind_of(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The type in which a base tensor is exported."""
    return tensor.dtype if dtype is None or not tensor.is_floating_point() else dtype


def rounded(name: str, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`values` in `dtype`; what was not finite before stays as it is.

    Raises:
        ArtefactError: a finite value becomes infinite.
    """
    result = values.to(dtype)
    if result.dtype == values.dtype or torch.isfinite(result).all():
        return result
    lost = torch.isfinite(values) & ~torch.isfinite(result)
    if lost.any():
        kind = str(dtype).removeprefix("torch.")
        raise ArtefactError(
            f"{name} has values up to {values[lost].abs().max():.3g}, which are infinite in {kind}: set export.dtype "
            "(with lander delta apply: --dtype) to bfloat16 or float32"
        )
    return result


Change = Callable[[torch.Tensor], torch.Tensor]
"""A base tensor in float32, which it may write into -> the trained one in float32."""


@dataclass(frozen=True)
class Merged:
    """A base and what training put into it. Values are rounded once, from float32."""

    weights: BaseWeights
    changes: Mapping[str, Sequence[Change]]
    """Name on disk -> changes."""

    def changed(self) -> Set[str]:
        """See `TensorSource`."""
        return self.changes.keys()

    def tensor(self, stored: str, dtype: torch.dtype | None) -> torch.Tensor:
        """See `TensorSource`."""
        base = self.weights.read(stored)
        if stored not in self.changes:
            return rounded(stored, base, kind_of(base, dtype))
        values = base.to(torch.promote_types(base.dtype, torch.float32), copy=True)
        for change in self.changes[stored]:
            values = change(values)
        if not torch.isfinite(values).all():
            raise ArtefactError(f"{stored} holds NaN or infinity after training: export another checkpoint")
        return rounded(stored, values, kind_of(base, dtype))


@dataclass(frozen=True)
class Scale:
    """A constant factor of some rows or columns."""

    dim: int
    neurons: torch.Tensor
    """[n] int64 indices along `dim`."""
    factor: float


@dataclass(frozen=True)
class Scaled:
    """A source with some rows and columns multiplied by constants."""

    source: TensorSource
    scales: Mapping[str, Sequence[Scale]]
    """Name on disk -> factors."""

    @property
    def weights(self) -> BaseWeights:
        """See `TensorSource`."""
        return self.source.weights

    def changed(self) -> Set[str]:
        """See `TensorSource`."""
        return self.source.changed() | self.scales.keys()

    def tensor(self, stored: str, dtype: torch.dtype | None) -> torch.Tensor:
        """See `TensorSource`."""
        if stored not in self.scales:
            return self.source.tensor(stored, dtype)
        base = self.weights.read(stored)
        values = self.source.tensor(stored, torch.promote_types(base.dtype, torch.float32)).clone()
        for scale in self.scales[stored]:
            part = values.index_select(scale.dim, scale.neurons)
            values.index_copy_(scale.dim, scale.neurons, part.mul_(scale.factor))
        return rounded(stored, values, kind_of(base, dtype))
