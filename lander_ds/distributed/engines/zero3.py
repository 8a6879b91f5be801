"""Topology zero3: every parameter is sharded by DeepSpeed ZeRO-3, over all ranks, or frozen ones over those of a node."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from lander_ds.config.recipe import FrozenShards
from lander_ds.distributed.engines.deepspeed_internals import (
    allocate_zero3,
    frozen_within,
    local_shard,
    set_shard,
    zero3_gradients,
    zero3_masters,
)
from lander_ds.distributed.engines.engine import Engine, preserved_buffers
from lander_ds.distributed.engines.figures import RankBytes, bytes_of, optimizer_bytes
from lander_ds.distributed.engines.single_span import SingleSpan
from lander_ds.distributed.nodes import node_group
from lander_ds.models.loading import Placement
from lander_ds.models.surgery import banks_of, routed_ffns
from lander_ds.models.translation_model import TranslationModel


def sharding(config: dict[str, Any], node: dist.ProcessGroup | None, grid: Any = None) -> Placement:
    """A placement that shards a unit as soon as it is read.

    Args:
        config: resolved DeepSpeed configuration.
        node: over which ranks to shard what is frozen; None: over the same as the rest.
        grid: DeepSpeed's process grid, to shard over the ranks of this pipeline stage; default: over all.
    """
    group = None if grid is None else grid.get_data_parallel_group()

    def shard(unit: nn.Module) -> None:
        with frozen_within(unit, node):
            deepspeed.zero.Init(module=unit, config_dict_or_path=config, mpu=grid, data_parallel_group=group)
        for _, routed in routed_ffns(unit):
            # All banks in one exchange: a routed FFN multiplies by all of them at once.
            for bank in banks_of(routed):
                for parameter in bank.parameters():
                    deepspeed.zero.register_external_parameter(routed, parameter)

    return shard


class ShardedState(Engine):
    """Mixin of engines whose parameters and optimizer state ZeRO-3 shards."""

    def _allocate(self) -> None:
        allocate_zero3(self._engine.optimizer)

    def _masters(self) -> Iterator[tuple[str, torch.Tensor]]:
        return zero3_masters(self._engine.optimizer)

    def _set_state(self, parameter: nn.Parameter, value: torch.Tensor, moment: str | None) -> None:
        set_shard(parameter, value, moment)

    def rank_bytes(self) -> RankBytes:
        """Shards of weights and gradients; float32 masters and moments."""
        weights = bytes_of(local_shard(parameter) for parameter in self.model.parameters())
        if not self._trains:
            return RankBytes(weights, 0, 0)
        optimizer = self._engine.optimizer
        masters = (part for _, part in self._masters())
        return RankBytes(
            weights, bytes_of([zero3_gradients(optimizer)]), optimizer_bytes(optimizer.optimizer, masters)
        )


class Zero3(ShardedState, SingleSpan):
    """DeepSpeed's engine under ZeRO-3."""

    def __init__(self, config: dict[str, Any], frozen_shards: FrozenShards = "world") -> None:
        """Prepare.

        Args:
            config: resolved DeepSpeed configuration.
            frozen_shards: over which ranks frozen weights are sharded.
        """
        super().__init__(config)
        self._node = node_group() if frozen_shards == "node" else None

    @property
    def placement(self) -> Placement:
        """Shards a unit over all ranks; what is frozen perhaps over those of this node."""
        return sharding(self._config, self._node)

    @property
    def reads_weights(self) -> bool:
        """One rank, or one on every node, reads and hands out."""
        return dist.get_rank(self._node) == 0

    def shard(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """DeepSpeed's engine around any module whose units have been through `placement`.

        Without it a module lacks the hooks that gather its weights; inference needs no more.
        """
        with preserved_buffers(model):
            engine, *_ = deepspeed.initialize(
                model=model, config=self._config, optimizer=optimizer, dist_init_required=False
            )
        return engine

    def _wrap(self, model: TranslationModel, optimizer: torch.optim.Optimizer | None) -> Any:
        return self.shard(model, optimizer)


def gather(parameters: list[nn.Parameter]) -> Any:
    """Context in which the whole parameters are readable on every rank."""
    return deepspeed.zero.GatheredParameters(parameters)
