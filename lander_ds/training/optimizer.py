"""Optimizers whose parameter groups carry `active`: an inactive group is not touched by a step at all.

DeepSpeed calls `step` once per sub-group under ZeRO-3 and once per step under ZeRO-1; both reach these classes. All
groups are inactive until the trainer says which banks the coming global batch owns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam

from lander_ds.config.schema.training import TrainConfig
from lander_ds.distributed.engines.engine import AVERAGE


class _ActiveGroups(torch.optim.Optimizer):
    """Mixin: `step` sees active groups alone; `allocate` makes state before the first step."""

    averages = False
    """Whether the state also holds an average of the parameter's values, which `Engine.average` keeps."""

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update the parameters of active groups; others keep weights, moments and step counts."""
        everything = self.param_groups
        self.param_groups = [group for group in everything if group["active"]]
        try:
            return super().step(closure)
        finally:
            self.param_groups = everything

    def allocate(self, parameters: Iterable[torch.Tensor]) -> None:
        """Make the state of `parameters` now instead of at their first step, so that memory is known at the start."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter].update(self._new_state(parameter))
                if self.averages:
                    self.state[parameter][AVERAGE] = parameter.detach().clone()

    def _new_state(self, parameter: torch.Tensor) -> dict[str, Any]:
        """Fresh state of one tensor."""
        return {}


class SelectiveAdamW(_ActiveGroups, torch.optim.AdamW):
    """torch.optim.AdamW over active groups."""

    def _new_state(self, parameter: torch.Tensor) -> dict[str, Any]:
        return {
            # Where torch's own lazy initialisation would put it when fused: on the device.
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }


class SelectiveSGD(_ActiveGroups, torch.optim.SGD):
    """torch.optim.SGD without momentum over active groups."""


class SelectiveCPUAdam(_ActiveGroups, DeepSpeedCPUAdam):
    """DeepSpeed's vectorised Adam for state in host memory, over active groups; it compiles its kernel on first use."""

    def _new_state(self, parameter: torch.Tensor) -> dict[str, Any]:
        return {
            "step": 0,
            "exp_avg": torch.zeros_like(parameter, device="cpu"),
            "exp_avg_sq": torch.zeros_like(parameter, device="cpu"),
        }


def build_optimizer(
    groups: Mapping[str, list[torch.nn.Parameter]], train: TrainConfig, offload: bool
) -> torch.optim.Optimizer:
    """The optimizer with one parameter group per name.

    Args:
        groups: group name -> parameters (see `models.parameter_groups`).
        train: optimizer options.
        offload: the DeepSpeed JSON keeps optimizer state in host memory: use DeepSpeed's vectorised CPU Adam.
    """
    optimizer = _new_optimizer(groups, train, offload)
    optimizer.averages = train.average.last > 0
    return optimizer


def _new_optimizer(
    groups: Mapping[str, list[torch.nn.Parameter]], train: TrainConfig, offload: bool
) -> _ActiveGroups:
    described = [
        {"params": parameters, "name": name, "active": False, "lr": learning_rate(name, train)}
        for name, parameters in groups.items()
    ]
    if train.optimizer == "sgd":
        return SelectiveSGD(described, lr=0.0, weight_decay=train.weight_decay)
    options: dict[str, Any] = {
        "lr": 0.0,
        "betas": train.betas,
        "eps": train.eps,
        "weight_decay": train.weight_decay,
    }
    if offload:
        return SelectiveCPUAdam(described, **options)
    # Also on CPUs: one pass over weights and moments instead of ten, and no temporaries of their size.
    return SelectiveAdamW(described, **options, fused=True)


def learning_rate(group: str, train: TrainConfig) -> float:
    """Peak learning rate of a parameter group."""
    return float(getattr(train.lr, group.split(":", maxsplit=1)[0]))
