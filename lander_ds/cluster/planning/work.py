"""Floating-point operations and bytes on the wire of one micro-batch and one step.

A product of a vector with a matrix of P elements costs 2 P operations. Counted are matrix products and attention;
norms, activation functions and the optimizer are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lander_ds.cluster.planning.anatomy import Anatomy, Tensor
from lander_ds.cluster.planning.memory import Sharding
from lander_ds.cluster.planning.workload import MicroBatch
from lander_ds.models.span import Span

PRODUCT = 2
"""Operations per element of a matrix and token."""


@dataclass(frozen=True)
class Operations:
    """Of one micro-batch in one span."""

    forward: float
    backward: float
    """Gradients of activations and of weights."""
    recompute: float
    """Forward passes that are repeated."""

    @property
    def total(self) -> float:
        """All of them."""
        return self.forward + self.backward + self.recompute


def operations(model: Anatomy, span: Span, batch: MicroBatch) -> Operations:
    """What a span computes for a micro-batch."""
    forward = backward = recompute = 0.0
    for index in range(span.start, span.stop):
        everything = model.layer(index)
        product = sum(tensor.product for tensor in everything)
        attention = _attention(model, index, batch)
        once = PRODUCT * batch.tokens * product + attention
        forward += once
        if index < model.first_trained:
            continue
        backward += PRODUCT * batch.tokens * sum(tensor.gradient for tensor in everything)
        if index > model.first_trained or (model.first_trained == 0 and _below_layers(model)):
            # Each of attention's two products has two gradients.
            inputs = PRODUCT * batch.tokens * product + 2 * attention
        else:
            after = (tensor.product for tensor in everything if _after_trained(tensor, everything))
            inputs = PRODUCT * batch.tokens * sum(after)
            inputs += 2 * attention if _attends(everything) else 0.0
        backward += inputs
        recompute += once if model.recipe.train.activation_checkpointing else 0.0
    if span.last:
        head = PRODUCT * batch.targets * model.head.numel()
        forward += head
        backward += head * ((span.stop > model.first_trained or not span.first) + model.head.requires_grad)
    return Operations(forward, backward, recompute)


def _below_layers(model: Anatomy) -> bool:
    """Whether something before the first layer is trained."""
    return any(tensor.trained for tensor in model.tensors(Span(0, 0, model.layers)))


READ_INPUT = ("q_proj", "k_proj", "v_proj", "query_key_value")
"""The projections with which attention begins."""


def _attends(layer: Sequence[Tensor]) -> bool:
    """Whether something in the attention of a layer is trained, so that a gradient passes through it."""
    return any(tensor.trained and not set(READ_INPUT).isdisjoint(tensor.name.split(".")) for tensor in layer)


def _after_trained(tensor: Tensor, layer: Sequence[Tensor]) -> bool:
    """Whether a gradient passes through this matrix in the lowest trained layer. There it ends at the first trained
    matrices: behind those of attention lies the whole layer, behind those of the FFN only its out-projection."""
    names = tensor.name.split(".")
    if _attends(layer):
        return set(READ_INPUT).isdisjoint(names)
    last = tensor.name.removesuffix(".weight").rpartition(".")[2]
    return last in ("down", "down_proj", "dense_4h_to_h", "fc2", "w2")


def _attention(model: Anatomy, index: int, batch: MicroBatch) -> float:
    """Scores and weighted values of one layer's forward pass, causal halves left out where the kernel does."""
    config = model.model.config
    heads = int(config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    sliding = window is not None and (types is None or types[index] == "sliding_attention")
    seen = sum(length * min(length, window if sliding and window else length) for length in batch.lengths)
    return 2.0 * PRODUCT * heads * width * seen / 2.0


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank receives, at least."""

    gathers: float
    """Of weights, per micro-batch."""
    inside: float
    """Those of them that come from ranks of the same node wherever the ranks are: frozen weights, per micro-batch."""
    reductions: float
    """Of gradients, per micro-batch (ZeRO-3) or per step (ZeRO-1)."""
    updates: float
    """Of updated weights, per step (ZeRO-1)."""
    collectives: int
    """Number of collectives per micro-batch."""
    over_bus: float
    """From and to the host, per micro-batch."""
    over_bus_step: float
    """From and to the host, per step."""


def traffic(model: Anatomy, span: Span, sharding: Sharding) -> Traffic:
    """What the data-parallel ranks of a span exchange."""
    tensors, item, share = model.tensors(span), model.item_bytes, 1.0 - 1.0 / sharding.ranks
    trained = sum(tensor.elements for tensor in tensors if tensor.trained)
    bus_step = (4 + item) * trained / sharding.ranks if sharding.offloads_optimizer else 0.0
    if not sharding.sharded:
        # An all-reduce; DeepSpeed sends gradients in the type of the weights, whatever they are added up in.
        return Traffic(0.0, 0.0, 2 * item * trained * share, item * trained * share, 0, 0.0, bus_step)
    threshold = sharding.zero.param_persistence_threshold
    large = [tensor for tensor in tensors if tensor.elements > threshold]
    again = _gathered_again(model, span, large, sharding)
    wanted = [(tensor, sharding.sharing(tensor)) for tensor in [*large, *again]]
    received = [(tensor.trained, item * tensor.elements * (1.0 - 1.0 / ranks)) for tensor, ranks in wanted]
    inside = sum(size for learns, size in received if not learns and sharding.frozen_ranks < sharding.ranks)
    bus = (
        sum(item * tensor.elements / ranks for tensor, ranks in wanted) if sharding.offloads_weights else 0.0
    )
    return Traffic(
        sum(size for _, size in received),
        inside,
        item * trained * share,
        0.0,
        sum(ranks > 1 for _, ranks in wanted),
        bus,
        bus_step,
    )


def _gathered_again(model: Anatomy, span: Span, large: Sequence[Tensor], sharding: Sharding) -> list[Tensor]:
    """What the backward pass gathers once more: the layers above the lowest trained one, unless they fit into what
    DeepSpeed keeps."""
    zero = sharding.zero
    if sum(tensor.elements for tensor in large) <= min(zero.max_live_parameters, zero.max_reuse_distance):
        return []
    names = {
        tensor.name
        for i in range(max(span.start, model.first_trained), span.stop)
        for tensor in model.layer(i)
    }
    return [tensor for tensor in large if tensor.name in names]
