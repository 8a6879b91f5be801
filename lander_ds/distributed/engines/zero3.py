"""Topology zero3: every parameter is sharded over all ranks by DeepSpeed ZeRO-3."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lander_ds.data.batching.packing import PackedBatch
from lander_ds.distributed import process_group
from lander_ds.distributed.engines.engine import (
    Engine,
    Figures,
    MakeModel,
    MakeOptimizer,
    RankBytes,
    bytes_of,
    held,
    kept_buffers,
    optimizer_bytes,
)
from lander_ds.models.loading import Placement
from lander_ds.models.translation_model import BatchTotals


def partitioner(config: dict[str, Any], grid: Any = None) -> Placement:
    """A `place` for `families.loading.fill` that shards a unit as soon as it is read.

    Args:
        config: resolved DeepSpeed configuration.
        grid: DeepSpeed's process grid, to shard over the ranks of this pipeline stage; default: over all.
    """
    import deepspeed

    group = None if grid is None else grid.get_data_parallel_group()

    def place(unit: nn.Module) -> None:
        deepspeed.zero.Init(module=unit, config_dict_or_path=config, mpu=grid, data_parallel_group=group)

    return place


def initialise(model: nn.Module, config: dict[str, Any], optimizer: torch.optim.Optimizer | None) -> Any:
    """The DeepSpeed engine around a model whose parameters are sharded already.

    Args:
        model: what the engine's forward calls.
        config: resolved DeepSpeed configuration.
        optimizer: None for passes that change no weight.
    """
    import deepspeed

    with kept_buffers(model):
        engine, *_ = deepspeed.initialize(
            model=model, config=config, optimizer=optimizer, dist_init_required=False
        )
    return engine


class Zero3(Engine):
    """DeepSpeed's engine under ZeRO-3."""

    def __init__(self, config: dict[str, Any], make_model: MakeModel, make_optimizer: MakeOptimizer) -> None:
        """Shard the model unit by unit and make the engine.

        Args:
            config: resolved DeepSpeed configuration.
            make_model, make_optimizer: called in this order.
        """
        self.model = make_model(partitioner(config))
        optimizer = make_optimizer()
        self._engine = initialise(self.model, config, optimizer)
        self._trains = optimizer is not None
        self.monitor = self._engine.monitor
        if self._trains:
            allocate(self._engine.optimizer)

    def train_step(self, batches: Sequence[PackedBatch], norm: BatchTotals) -> Figures:
        """One optimizer step over this rank's micro-batches."""
        engine, found = self._engine, self._nothing()
        engine.train()
        for batch in batches:
            loss, sums, penalty = engine(batch, norm)
            # DeepSpeed averages gradients over data-parallel ranks; the loss is normalised over all of them already.
            engine.backward(loss * process_group.world_size(), scale_wrt_gas=False)
            engine.step()
            found.per_pair.add_(sums.cpu())
            found.budget.add_(penalty.cpu())
        return found

    @torch.no_grad()
    def evaluate(self, batches: Sequence[PackedBatch], norm: BatchTotals) -> Figures:
        """Forward passes alone."""
        found = self._nothing()
        self._engine.eval()
        for batch in batches:
            _, sums, penalty = self._engine(batch, norm)
            found.per_pair.add_(sums.cpu())
            found.budget.add_(penalty.cpu())
        return found

    def differentiate(self, batches: Sequence[PackedBatch], norm: BatchTotals) -> None:
        """Forward and backward passes without optimizer."""
        self._engine.eval()
        for batch in batches:
            # Not through the engine's forward: without an optimizer it refuses every backward pass. ZeRO-3 gathers
            # and releases weights by hooks on the modules themselves.
            loss, _, _ = self._engine.module(batch, norm)
            loss.backward()

    def _masters(self) -> Iterator[tuple[str, torch.Tensor]]:
        return zero3_masters(self._engine.optimizer)

    def _set_state(self, parameter: nn.Parameter, value: torch.Tensor, moment: str | None) -> None:
        set_shard(parameter, value, moment)

    def rank_bytes(self) -> RankBytes:
        """Shards of weights and gradients; float32 masters and moments."""
        return zero3_bytes(self.model, self._engine.optimizer if self._trains else None)

    def _nothing(self) -> Figures:
        return Figures(
            torch.zeros(2, self.model.pairs, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        )


def allocate(optimizer: Any) -> None:
    """Make the state of DeepSpeed's ZeRO-3 optimizer now, so that its size is known before the first step."""
    if hasattr(optimizer.optimizer, "allocate"):
        optimizer.optimizer.allocate(part for part in optimizer.fp32_partitioned_groups_flat if part.numel())


def zero3_masters(optimizer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Group name and flat float32 masters of every sub-group of DeepSpeed's ZeRO-3 optimizer that has any here."""
    names = [group["name"] for group in optimizer.optimizer.param_groups]
    for number, part in enumerate(optimizer.fp32_partitioned_groups_flat):
        if part.numel():
            yield names[optimizer.sub_group_to_group_id[number]], part


def set_shard(parameter: nn.Parameter, value: torch.Tensor, moment: str | None) -> None:
    """Put this rank's shard of a whole tensor into the float32 master (`moment` None) or a moment of a parameter.

    DeepSpeed's own function for whole tensors fails where the last shard is padded.
    """
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    length = held(parameter).numel()
    begin = length * dist.get_rank(parameter.ds_process_group)  # type: ignore[attr-defined]
    shard = torch.zeros(length, dtype=torch.float32)
    part = value.flatten()[begin : begin + length]
    shard[: len(part)] = part
    if moment is None:
        safe_set_local_fp32_param(parameter, shard)
    else:
        safe_set_local_optimizer_state(parameter, shard, moment)


def zero3_bytes(model: nn.Module, optimizer: Any) -> RankBytes:
    """What a rank holds under ZeRO-3; `optimizer` is DeepSpeed's, or None when nothing is trained."""
    weights = bytes_of(held(parameter) for parameter in model.parameters())
    if optimizer is None:
        return RankBytes(weights, 0, 0)
    return RankBytes(
        weights,
        bytes_of([optimizer.grad_partitions_flat_buffer]),
        optimizer_bytes(optimizer.optimizer, optimizer.fp32_partitioned_groups_flat),
    )


def gather(parameters: list[nn.Parameter]) -> Any:
    """Context in which the whole parameters are readable on every rank."""
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)
