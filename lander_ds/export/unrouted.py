"""A routed export read as the base it came from: banks put together again in the base's order."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from lander_ds.common.errors import ArtefactError
from lander_ds.config.recipe import ModelConfig
from lander_ds.config.schema.method import RoutingConfig
from lander_ds.export.pieces import Share, shares
from lander_ds.export.routed import PREFIX
from lander_ds.export.trained import is_gate
from lander_ds.method.selection import Selection
from lander_ds.models.loading import build, tied_parameters
from lander_ds.models.surgery import Slice, install
from lander_ds.models.weights import (
    BaseWeights,
    Piece,
    experts_among,
    experts_dimension,
    pieces,
    stored_among,
)


class Unrouted:
    """The tensors of a routed model directory under the base's names."""

    def __init__(
        self,
        weights: BaseWeights,
        config: Path,
        names: Iterable[str],
        selection: Selection,
        routing: RoutingConfig,
    ) -> None:
        """Find out which bank parameters make up which base tensor.

        Args:
            weights: of the routed directory.
            config: directory with the base's config.json.
            names: the base's tensors on disk.
            selection: layers and banks.
            routing: gate options.
        """
        self._weights = weights
        model, family = build(ModelConfig(str(config), dtype="float32"), attention=None)
        install(model, family, selection, routing, seed=0)
        self._parts: dict[str, list[tuple[str, Share]]] = {}
        self._whole: dict[str, tuple[str, Piece | None]] = {}
        names, tied = set(names), tied_parameters(model)
        experts = experts_among(names)
        known = names | experts.keys()

        def pieces_of(target: str, shape: torch.Size) -> list[Piece]:
            own, dim = experts.get(target, []), experts_dimension(target)
            return pieces(own, dim, shape[dim] // len(own)) if own else []

        def stored(name: str) -> str | None:
            return stored_among(known, name, model.base_model_prefix, family.renamed)

        for name, parameter in model.named_parameters():
            cut: Slice | None = getattr(parameter, "lander_slice", None)
            target = stored(name if cut is None else cut.tensor)
            if target is None or is_gate(name):
                continue
            if cut is not None:
                for share in shares(cut, target, pieces_of(target, cut.shape)):
                    self._parts.setdefault(share.stored, []).append((PREFIX + name, share))
            elif target in experts:
                for piece in pieces_of(target, parameter.shape):
                    self._whole[piece.name] = PREFIX + name, piece
            else:
                self._whole[target] = PREFIX + name, None
        # Some bases hold tied tensors twice; unequal ones are not tied.
        for name, original in tied.items():
            if (target := stored(name)) is not None:
                self._whole[target] = PREFIX + (name if PREFIX + name in weights else original), None

    def __contains__(self, name: str) -> bool:
        parts = [part for part, _ in self._parts.get(name, [])] or [self._whole.get(name, ("", None))[0]]
        return all(part in self._weights for part in parts)

    def read(self, name: str) -> torch.Tensor:
        """The tensor of the base called `name`.

        Raises:
            ArtefactError: its parts do not fit together.
        """
        if name in self._whole:
            stored, piece = self._whole[name]
            values = self._weights.read(stored)
            return values if piece is None else piece.of(values)
        whole: torch.Tensor | None = None
        for part, share in self._parts[name]:
            values = share.of(self._weights.read(part))
            whole = torch.empty(share.cut.shape, dtype=values.dtype) if whole is None else whole
            if values.dtype != whole.dtype:
                raise ArtefactError(f"{self._weights.directory}: {part} is of another type than other banks")
            share.cut.put(whole, values)
        assert whole is not None
        return whole
