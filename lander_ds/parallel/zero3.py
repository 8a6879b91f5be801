"""Topology zero3: every parameter is sharded over all ranks by DeepSpeed ZeRO-3.

Also the measurements that a user can check: bytes of weights, gradients and optimizer state on this rank, summed
from the real tensors, and a digest of everything that must not change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lander_ds.families.loading import Place


def partitioner(config: dict[str, Any]) -> Place:
    """A `place` for `families.loading.fill` that shards a unit over the ranks as soon as it is read."""
    import deepspeed

    def place(unit: nn.Module) -> None:
        deepspeed.zero.Init(module=unit, config_dict_or_path=config)

    return place


def initialise(model: nn.Module, config: dict[str, Any], optimizer: torch.optim.Optimizer | None) -> Any:
    """The DeepSpeed engine around a model whose parameters are sharded already.

    Buffers keep their type: DeepSpeed would turn rotary frequencies into bfloat16, which moves far positions.

    Args:
        model: what the engine's forward calls.
        config: resolved DeepSpeed configuration.
        optimizer: None for passes that change no weight.
    """
    import deepspeed

    buffers = [
        (module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()
    ]
    kept = [(module, name, buffer.clone()) for module, name, buffer in buffers if buffer is not None]
    engine, *_ = deepspeed.initialize(
        model=model, config=config, optimizer=optimizer, dist_init_required=False
    )
    for module, name, buffer in kept:
        current = module._buffers[name]
        assert current is not None
        module._buffers[name] = buffer.to(current.device)
    return engine


@dataclass(frozen=True)
class RankBytes:
    """Bytes that one rank holds, summed over real tensors."""

    weights: int
    gradients: int
    optimizer: int


def allocate_optimizer_state(engine: Any) -> None:
    """Make the optimizer's state now, so that `rank_bytes` counts what training will hold."""
    inner = engine.optimizer.optimizer
    if hasattr(inner, "allocate"):
        inner.allocate(part for part in engine.optimizer.fp32_partitioned_groups_flat if part.numel())


def rank_bytes(engine: Any) -> RankBytes:
    """What this rank holds: weight shards; the gradient shards; float32 masters and moments."""
    zero = engine.optimizer
    weights = sum(_bytes(parameter.ds_tensor) for parameter in engine.module.parameters())
    gradients = _bytes(zero.grad_partitions_flat_buffer)
    masters = sum(_bytes(part) for part in zero.fp32_partitioned_groups_flat)
    moments = sum(
        _bytes(value)
        for state in zero.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.dim() > 0
    )
    return RankBytes(weights, gradients, masters + moments)


def _bytes(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def numel(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter, of which this rank holds a shard."""
    return int(parameter.ds_numel)  # type: ignore[attr-defined]


def frozen_digest(module: nn.Module) -> str:
    """Digest of this rank's shards of every frozen parameter (hex). Equal digests: bitwise equal shards."""
    digest = hashlib.blake2b()
    for name, parameter in sorted(module.named_parameters()):
        if not parameter.requires_grad:
            digest.update(name.encode())
            shard: torch.Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
            digest.update(_raw(shard))
    return digest.hexdigest()


def _raw(tensor: torch.Tensor) -> Any:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data


def trained_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and whole float32 master value of every trained parameter (collective: every rank must iterate)."""
    from deepspeed.utils import safe_get_full_fp32_param

    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            yield name, safe_get_full_fp32_param(parameter)


def gather(parameters: list[nn.Parameter]) -> Any:
    """Context in which the whole parameters are readable on every rank."""
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)
