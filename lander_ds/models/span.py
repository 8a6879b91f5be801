"""Which part of a model a rank computes: everything, or one pipeline stage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from torch import nn
from transformers import PreTrainedModel

from lander_ds.models.family import Family


@dataclass(frozen=True)
class Span:
    """Decoder layers `start` to `stop` (not included). The first span also embeds, the last also has norm and head."""

    start: int
    stop: int
    layers: int
    """Decoder layers of the whole model."""

    @property
    def first(self) -> bool:
        """Whether it begins with the embedding."""
        return self.start == 0

    @property
    def last(self) -> bool:
        """Whether it ends with the head."""
        return self.stop == self.layers


def whole(model: PreTrainedModel, family: Family) -> Span:
    """The span of a model that is not cut."""
    layers = len(family.layers_of(model))
    return Span(0, layers, layers)


def spans(cut: tuple[int, ...], layers: int) -> tuple[Span, ...]:
    """The spans between the first layers of the stages.

    Args:
        cut: first decoder layer of every stage but the first.
        layers: decoder layers of the model.
    """
    borders = (0, *cut, layers)
    return tuple(Span(start, stop, layers) for start, stop in pairwise(borders))


def units(model: PreTrainedModel, family: Family, span: Span) -> Iterator[tuple[str, nn.Module]]:
    """Parts of the span that are read and placed in turn: (name, module), together all its parameters."""
    for name, child in family.decoder_of(model).named_children():
        if name == family.layers:
            for index in range(span.start, span.stop):
                yield f"{family.decoder}.{name}.{index}", family.layers_of(model)[index]
        elif span.last if name in family.final else span.first or next(child.parameters(), None) is None:
            # What has no parameters, such as the rotary embedding, every span needs.
            yield f"{family.decoder}.{name}", child
    if span.last:
        head = model.get_output_embeddings()
        for name, child in model.named_modules():
            if child is head:
                yield name, child
