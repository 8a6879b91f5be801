"""Optimizers over active groups."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import nn

from lander_ds.config.schema.training import LearningRates, TrainConfig
from lander_ds.training.optimizer import SelectiveAdamW, build_optimizer

TRAIN = TrainConfig(
    betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1, lr=LearningRates(general=0.01, specific=0.02)
)


def parameters() -> dict[str, list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: [
            nn.Parameter(torch.randn(5, 3, generator=generator)),
            nn.Parameter(torch.randn(4, generator=generator)),
        ]
        for name in ("general", "specific:en-de")
    }


def set_gradients(groups: dict[str, list[nn.Parameter]], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for holding in groups.values():
        for parameter in holding:
            parameter.grad = torch.randn(parameter.shape, generator=generator)


def activate(optimizer: torch.optim.Optimizer, names: Iterable[str]) -> None:
    for group in optimizer.param_groups:
        group["active"] = group["name"] in names


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("allocate", [False, True])
def test_active_groups_move_as_under_torchs_optimizer(kind: str, allocate: bool) -> None:
    ours, theirs = parameters(), parameters()
    optimizer = build_optimizer(ours, TrainConfig(**{**vars(TRAIN), "optimizer": kind}), offload=False)
    if allocate:
        optimizer.allocate(p for holding in ours.values() for p in holding)  # type: ignore[attr-defined]
    described = [
        {"params": holding, "lr": 0.01 if name == "general" else 0.02} for name, holding in theirs.items()
    ]
    reference: torch.optim.Optimizer = (
        torch.optim.AdamW(described, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1, fused=True)
        if kind == "adamw"
        else torch.optim.SGD(described, weight_decay=0.1)
    )
    for step in range(6):
        # The specific bank rests in every third step.
        rests = step % 3 == 2
        set_gradients(ours, step)
        set_gradients(theirs, step)
        if rests:
            for parameter in theirs["specific:en-de"]:
                parameter.grad = None
        activate(optimizer, {"general"} if rests else set(ours))
        optimizer.step()
        reference.step()
    for name, holding in ours.items():
        for one, other in zip(holding, theirs[name], strict=True):
            assert torch.equal(one, other), name


def test_an_inactive_group_is_not_touched_at_all() -> None:
    groups = parameters()
    optimizer = build_optimizer(groups, TRAIN, offload=False)
    activate(optimizer, groups)
    set_gradients(groups, 0)
    optimizer.step()
    idle = groups["specific:en-de"]
    before = [p.detach().clone() for p in idle]
    states = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in idle]
    activate(optimizer, {"general"})
    set_gradients(groups, 1)
    optimizer.step()
    for parameter, value, state in zip(idle, before, states, strict=True):
        assert torch.equal(parameter, value)
        assert all(torch.equal(optimizer.state[parameter][k], v) for k, v in state.items())
    assert len(optimizer.param_groups) == 2


def test_allocation_takes_all_the_memory_there_will_be() -> None:
    groups = parameters()
    optimizer = build_optimizer(groups, TRAIN, offload=False)
    assert isinstance(optimizer, SelectiveAdamW)
    everything = [p for holding in groups.values() for p in holding]
    optimizer.allocate(everything)

    def size() -> int:
        return sum(v.numel() for p in everything for v in optimizer.state[p].values() if v.dim())

    allocated = size()
    assert allocated == 2 * sum(p.numel() for p in everything)
    activate(optimizer, groups)
    set_gradients(groups, 0)
    optimizer.step()
    assert size() == allocated


def test_a_step_that_fails_keeps_all_groups() -> None:
    groups = parameters()
    optimizer = build_optimizer(groups, TRAIN, offload=False)
    activate(optimizer, {"general"})
    groups["general"][0].grad = torch.ones(5, 3)

    def closure() -> float:
        raise ValueError("no loss")

    with pytest.raises(ValueError, match="no loss"):
        optimizer.step(closure)
    assert len(optimizer.param_groups) == 2
