"""Bytes that every rank holds: exact where tensors lie in memory all the time, estimated for what comes and goes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lander_ds.cluster.planning.anatomy import Anatomy, Tensor
from lander_ds.config.schema.training import TrainConfig
from lander_ds.models.loss import CHUNK_ELEMENTS, DEVICE_SOFTMAX_ELEMENTS
from lander_ds.models.span import Span

MASTER, MOMENTS, AVERAGE = 4, 8, 4
"""Bytes per trained parameter: float32 master; AdamW's two moments; the average over steps."""
ZERO1_ALIGNMENT = 2
"""DeepSpeed pads a parameter group under ZeRO-1 to a multiple of this times the ranks."""
GRADIENT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
INDEX_BYTES = 8
SAFETENSORS_PREFIX = 8


@dataclass(frozen=True)
class Sharding:
    """How a rank's span is held."""

    zero: Any
    """DeepSpeed's `DeepSpeedZeroConfig` of the resolved JSON."""
    ranks: int
    """Data-parallel ranks that share the span."""
    frozen_ranks: int
    """Those of them that share its frozen weights under ZeRO-3: all, or the fewest of a node."""
    gradient_bytes: int
    """Per element of accumulated gradients."""
    pipeline: bool
    """Several stages."""

    @property
    def sharded(self) -> bool:
        """ZeRO-3: weights and gradients too."""
        return int(self.zero.stage) == 3

    def sharing(self, tensor: Tensor) -> int:
        """Ranks that share a weight under ZeRO-3."""
        return self.ranks if tensor.trained else self.frozen_ranks

    @property
    def offloads_optimizer(self) -> bool:
        """Optimizer and gradients live on the host."""
        return _offloads(self.zero.offload_optimizer)

    @property
    def offloads_weights(self) -> bool:
        """Shards of the weights live on the host."""
        return self.sharded and _offloads(self.zero.offload_param)


def _offloads(block: Any) -> bool:
    return block is not None and block.device not in (None, "none")


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank. The first three are exact, and what training.json records."""

    weights: int
    gradients: int
    optimizer: int
    persistent: int
    """ZeRO-3: small parameters that stay whole."""
    gathered: int
    """ZeRO-3: weights that are whole for a while, at most. Otherwise: the largest quantised matrix, for a product."""
    bucket: int
    """Buffers in which gradients are reduced, and the largest gradient on its way there."""
    loss: int
    """A chunk of logits, and its softmax."""
    activations: int
    """Of all micro-batches that are under way."""
    on_host: int
    """Part of all this that lies in the host's memory."""

    @property
    def on_device(self) -> int:
        """Part of all this that lies on the GPU."""
        everything = (
            self.weights
            + self.gradients
            + self.optimizer
            + self.persistent
            + self.gathered
            + self.bucket
            + self.loss
            + self.activations
        )
        return everything - self.on_host


def shard(elements: int, ranks: int) -> int:
    """Elements of one rank's part of a parameter under ZeRO-3: all parts are equal, the last is padded."""
    return -(-elements // ranks)


def weight_bytes(tensors: Sequence[Tensor], sharding: Sharding, item: int) -> int:
    """Bytes of a rank's weights (exact)."""
    if sharding.sharded:
        return item * sum(shard(tensor.elements, sharding.sharing(tensor)) for tensor in tensors)
    return sum(item * t.elements if t.quantized is None else t.quantized for t in tensors)


def gradient_bytes(tensors: Sequence[Tensor], sharding: Sharding) -> int:
    """Bytes of a rank's accumulated gradients at the end of a step (exact): ZeRO-1 keeps them whole until then."""
    ranks = sharding.ranks if sharding.sharded else 1
    return sharding.gradient_bytes * sum(shard(t.elements, ranks) for t in tensors if t.trained)


def optimizer_elements(tensors: Sequence[Tensor], sharding: Sharding) -> int:
    """Trained elements whose master and moments a rank holds, padding included (exact)."""
    if sharding.sharded:
        return sum(shard(tensor.elements, sharding.ranks) for tensor in tensors if tensor.trained)
    groups: dict[str, int] = {}
    for tensor in tensors:
        if tensor.group is not None:
            groups[tensor.group] = groups.get(tensor.group, 0) + tensor.elements
    return sum(shard(size, ZERO1_ALIGNMENT * sharding.ranks) * ZERO1_ALIGNMENT for size in groups.values())


def state_bytes(train: TrainConfig) -> int:
    """Bytes of optimizer state per trained element, its master and average included."""
    return MASTER + (MOMENTS if train.optimizer == "adamw" else 0) + (AVERAGE if train.average.last else 0)


def rank_memory(model: Anatomy, span: Span, sharding: Sharding, targets: int, activations: int) -> RankMemory:
    """What a rank of a span holds.

    Args:
        model: the model.
        span: what the rank computes.
        sharding: how it is held.
        targets: target tokens of a micro-batch.
        activations: bytes that all micro-batches under way keep.
    """
    tensors, item = model.tensors(span), model.item_bytes
    weights = weight_bytes(tensors, sharding, item)
    gradients = gradient_bytes(tensors, sharding)
    optimizer = state_bytes(model.recipe.train) * optimizer_elements(tensors, sharding)
    host = (gradients + optimizer if sharding.offloads_optimizer else 0) + (
        weights if sharding.offloads_weights else 0
    )
    persistent, gathered = _whole_weights(tensors, sharding, item)
    return RankMemory(
        weights,
        gradients,
        optimizer,
        persistent,
        gathered,
        _bucket_bytes(tensors, sharding, item),
        _loss_bytes(model, targets) if span.last else 0,
        activations,
        host,
    )


def _whole_weights(tensors: Sequence[Tensor], sharding: Sharding, item: int) -> tuple[int, int]:
    """Bytes of parameters that stay whole under ZeRO-3, and at most of those that are whole for a while.

    A parameter is gathered when its module runs; DeepSpeed keeps what it gathered, or gathers ahead, while there are
    fewer than `stage3_max_live_parameters`. On one rank a whole parameter is a copy of its only part, too.
    Without ZeRO-3 all are whole, and quantised ones are put together one at a time.
    """
    if not sharding.sharded:
        return 0, item * max((t.elements for t in tensors if t.quantized is not None), default=0)
    zero = sharding.zero
    threshold = zero.param_persistence_threshold
    small = sum(tensor.elements for tensor in tensors if tensor.elements <= threshold)
    together: dict[str, int] = {}
    for tensor in tensors:
        if tensor.elements > threshold:
            # The banks of a routed FFN come at once.
            module = tensor.name.partition(".banks.")[0]
            together[module] = together.get(module, 0) + tensor.elements
    ahead = zero.max_reuse_distance or zero.prefetch_bucket_size
    live = max(zero.max_live_parameters if ahead else 0, max(together.values(), default=0))
    return item * small, item * min(sum(together.values()), live)


def _bucket_bytes(tensors: Sequence[Tensor], sharding: Sharding, item: int) -> int:
    trained = [tensor.elements for tensor in tensors if tensor.trained]
    if not trained:
        return 0
    bucket = int(sharding.zero.reduce_bucket_size)
    if sharding.sharded:
        # What is in the bucket is put in the order of the ranks before it is scattered; a larger gradient goes alone.
        scattered = min(bucket, sum(elements for elements in trained if elements <= bucket))
        staged = item * (bucket * bool(sharding.zero.contiguous_gradients) + scattered)
    else:
        # ZeRO-1 stages the accumulated gradients, in their own type; overlapping needs a bucket to fill meanwhile.
        buffers = sharding.zero.contiguous_gradients or sharding.offloads_optimizer
        staged = sharding.gradient_bytes * (1 + bool(sharding.zero.overlap_comm)) * bucket * bool(buffers)
    return staged + item * max(trained)


def _loss_bytes(model: Anatomy, targets: int) -> int:
    """Logits of a chunk in the model's type, their softmax in float32 in parts, the gradient of the chunk."""
    vocabulary, width = model.head.shape
    rows = min(targets, max(1, CHUNK_ELEMENTS // vocabulary))
    return (
        rows * vocabulary * model.item_bytes
        + 3 * 4 * min(DEVICE_SOFTMAX_ELEMENTS, rows * vocabulary)
        + 4 * rows * width
    )


def checkpoint_bytes(model: Anatomy) -> int:
    """Size of the safetensors files of a checkpoint: masters, moments, averages, the selection (exact but for padding)."""
    trained = [tensor for tensor in model.tensors(model.whole) if tensor.trained]
    adamw = model.recipe.train.optimizer == "adamw"
    total = _file_bytes({tensor.name: tensor for tensor in trained}, MASTER)
    if adamw:
        moments = {f"{moment}/{t.name}": t for moment in ("exp_avg", "exp_avg_sq") for t in trained}
        total += _file_bytes(moments, MASTER)
    if model.recipe.train.average.last:
        total += _file_bytes({tensor.name: tensor for tensor in trained}, AVERAGE)
    if model.selection is not None:
        total += 2 * INDEX_BYTES * model.selection.neurons * len(model.selection.layers)
        total += len(json.dumps([[vars(bank) for bank in layer.banks] for layer in model.selection.layers]))
    return total


def _file_bytes(tensors: dict[str, Tensor], item: int) -> int:
    """Of one safetensors file: a JSON header with every tensor's name, type, shape and place, then the values."""
    values = item * sum(tensor.elements for tensor in tensors.values())
    header = {
        name: {"dtype": "F32", "shape": tensor.shape, "data_offsets": [values, values]}
        for name, tensor in tensors.items()
    }
    return SAFETENSORS_PREFIX + len(json.dumps(header, separators=(",", ":"))) + values
