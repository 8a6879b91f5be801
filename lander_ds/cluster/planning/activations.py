"""Bytes of activations that the graph keeps for the backward pass, by running the trainer's own model on fake tensors.

Fake tensors have shapes and types, and no memory: a model of any size runs its real forward pass within seconds, and
what autograd saves is counted as it is saved, every storage once, parameters left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from transformers import AttentionInterface

from lander_ds.cluster.planning.anatomy import anatomy
from lander_ds.cluster.planning.workload import MicroBatch
from lander_ds.config.recipe import Recipe
from lander_ds.data.batching.packing import PackedBatch
from lander_ds.models.attention import packed_attention
from lander_ds.models.translation_model import BatchTotals, Objective, TranslationModel

FUSED = "lander_planned_fused"
TRACED_TARGETS = 8
"""Target tokens of the traced micro-batch: the loss works in many small parts, and what it keeps is proportional."""


@dataclass(frozen=True)
class Activations:
    """Bytes that one micro-batch keeps between its forward and its backward pass."""

    layers: tuple[int, ...]
    """Of every decoder layer, its input included; without recomputation."""
    end: int
    """Of norm, head and loss."""
    hidden: int
    """Of one hidden state [T, d]: what a layer keeps that is recomputed."""

    def kept(self, start: int, stop: int, last: bool, first_trained: int, recompute: bool) -> int:
        """Of decoder layers `start` to `stop`, and of the end with `last`."""
        inputs_alone = self.hidden * max(0, stop - max(start, first_trained))
        layers = inputs_alone if recompute else sum(self.layers[start:stop])
        return layers + (self.end if last else 0)

    def largest(self, start: int, stop: int) -> int:
        """Of the layer that keeps most: what a recomputation holds at one time."""
        return max(self.layers[start:stop])


def trace(recipe: Recipe, batch: MicroBatch, sharded: bool, fused: bool) -> Activations:
    """What one micro-batch keeps.

    Args:
        recipe: what is trained.
        batch: sizes of the micro-batch.
        sharded: ZeRO-3, under which DeepSpeed's linear layers keep the input of frozen projections too.
        fused: attention in one kernel that keeps queries, keys, values, outputs and one number per row, as on GPUs;
            otherwise what the trainer does on CPU.
    """
    whole = anatomy(recipe, FUSED if fused else None)
    with FakeTensorMode(allow_non_fake_inputs=True), _linear(sharded):
        model, family = whole.model, whole.family
        model.to_empty(device="cpu")
        objective = Objective(recipe.routing.budget_weight, recipe.routing.budget)
        span = TranslationModel(model, family, len(recipe.data.pairs), objective)
        # The loss of a trained head looks at values, which are fake here; it keeps about as much.
        whole.head.requires_grad_(False)
        counter = _Counter(parameters={p.untyped_storage()._cdata for p in model.parameters()})
        for index, layer in enumerate(family.layers_of(model)):
            layer.register_forward_pre_hook(counter.enter(index))
            layer.register_forward_hook(counter.leave)
        with torch.autograd.graph.saved_tensors_hooks(counter.save, lambda tensor: tensor):
            span(_packed(batch, TRACED_TARGETS), BatchTotals(1, 1))
        kept = [counter.bytes.get(index, 0) for index in range(whole.layers)]
        hidden = batch.tokens * whole.width * whole.item_bytes
    end = counter.bytes.get(None, 0) * batch.targets // TRACED_TARGETS
    return Activations(tuple(kept), end, hidden)


class _Counter:
    """Adds up storages by the decoder layer that runs when they are first saved; None: outside of layers."""

    def __init__(self, parameters: set[int]) -> None:
        self.bytes: dict[int | None, int] = {}
        self._seen = dict.fromkeys(parameters)
        self._alive: list[Any] = []
        self._layer: int | None = None

    def enter(self, index: int) -> Any:
        def hook(*_: Any) -> None:
            self._layer = index

        return hook

    def leave(self, *_: Any) -> None:
        self._layer = None

    def save(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen[storage._cdata] = None
            # Kept, so that no other storage gets the same address.
            self._alive.append(storage)
            self.bytes[self._layer] = self.bytes.get(self._layer, 0) + storage.nbytes()
        return tensor


class _Kernel(torch.autograd.Function):
    """Saves what a fused attention kernel saves, computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        rows = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, rows)
        return output


def _fused(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    if options.get("softcap") is not None:
        return packed_attention(module, query, key, value, attention_mask, **options)
    output: torch.Tensor = _Kernel.apply(query, key, value)  # type: ignore[no-untyped-call]
    return torch.cat([output], 2).transpose(1, 2).contiguous(), None


AttentionInterface.register(FUSED, _fused)


@contextmanager
def _linear(sharded: bool) -> Iterator[None]:
    """Within this context linear layers are DeepSpeed's or torch's own, whatever ZeRO-3 has left behind before."""
    before = functional.linear
    functional.linear = zero3_linear_wrap if sharded else torch._C._nn.linear
    try:
        yield
    finally:
        functional.linear = before


def _packed(batch: MicroBatch, targets: int) -> PackedBatch:
    ids = torch.zeros(batch.tokens, dtype=torch.int64)
    lengths = batch.lengths
    positions = torch.cat([torch.arange(length) for length in lengths])
    segments = torch.zeros(batch.tokens, dtype=torch.int64)
    samples, chosen = torch.zeros(len(lengths), dtype=torch.int64), torch.zeros(targets, dtype=torch.int64)
    boundaries = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    return PackedBatch(ids, positions, ids, segments, lengths, samples, chosen, chosen, boundaries)
