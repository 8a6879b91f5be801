"""Averages of the trained weights over the last steps, in every topology; what is translated and exported is theirs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.checkpoints import recipe_for, write_checkpoint
from support.exports import dense, open_trained, rewrite, tensors, trained_logits
from support.tiny_models import save, tiny_model
from support.tiny_run import TinyRun
from torch import nn

from lander_ds.checkpoint import checkpoint
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.schema.training import AverageConfig, TrainConfig
from lander_ds.distributed.engines.engine import AVERAGE
from lander_ds.training.optimizer import build_optimizer


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world", "name"),
    [
        ("world_2", "averaged-2"),
        ("stages_2", "pipeline-2x1-averaged-2"),
        ("stages_2", "pipeline_zero3-2x1-averaged-2"),
    ],
)
def test_the_average_is_the_mean_over_the_last_steps(
    request: pytest.FixtureRequest, world: str, name: str
) -> None:
    runs: TinyRun = request.getfixturevalue(world)
    saved = [checkpoint.load(runs.run(name).checkpoints / f"step-{step}") for step in (1, 2, 3, 4)]
    assert [one.state["progress"]["averaged"] for one in saved] == [0, 1, 2, 3]
    assert len(saved[0].averaged()) == 0
    assert set(saved[0].result()) == set(saved[0].trained())
    for last in (1, 2, 3):
        actual, summed = saved[last].averaged(), [one.trained() for one in saved[1 : last + 1]]
        assert set(actual) == set(summed[0])
        for key, value in actual.items():
            mean = torch.stack([part[key] for part in summed]).mean(0)
            torch.testing.assert_close(value, mean, rtol=1e-5, atol=1e-6)
    moved = saved[3].trained()
    assert any(not torch.equal(value, moved[key]) for key, value in saved[3].result().items())


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_state_for_averages_is_there_only_where_it_is_wanted(kind: str) -> None:
    for last in (0, 3):
        parameter = nn.Parameter(torch.ones(3))
        train = TrainConfig(optimizer=kind, average=AverageConfig(last))  # type: ignore[arg-type]
        optimizer = build_optimizer({"general": [parameter]}, train, offload=False)
        optimizer.allocate([parameter])  # type: ignore[attr-defined]
        state = optimizer.state[parameter]
        assert (AVERAGE in state) == (last > 0)
        if last:
            assert torch.equal(state[AVERAGE], parameter)
            assert state[AVERAGE] is not parameter
            assert not state[AVERAGE].requires_grad


def test_translations_and_exports_are_the_averages(tmp_path: Path) -> None:
    base = save(tiny_model("llama"), tmp_path / "base")
    plain = recipe_for(base, tmp_path / "plain", gate="none")
    averaged = replace(plain, run_dir=str(tmp_path / "averaged"))
    trained = write_checkpoint(plain)
    write_checkpoint(averaged)
    means = {name: value - 0.05 for name, value in trained.items()}
    rewrite(RunDirectory(plain.run_dir), lambda tensors: tensors.update(means))
    rewrite(RunDirectory(averaged.run_dir), lambda tensors: None, averaged=means)
    for one, other in zip(trained_logits(averaged, "en-de"), trained_logits(plain, "en-de"), strict=True):
        assert torch.equal(one, other)
    written, wanted = (tensors(dense(recipe)) for recipe in (averaged, plain))
    assert all(torch.equal(written[name], value) for name, value in wanted.items())
    assert open_trained(averaged).method == "lander"
