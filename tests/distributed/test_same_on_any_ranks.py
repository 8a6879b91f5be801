"""The same run on 1, 2 and 4 ranks, with any micro-batch and packing: same losses, weights and awareness."""

from __future__ import annotations

import pytest
from support.compare import (
    assert_same_awareness,
    assert_same_training,
    metrics,
    norm,
    trained,
    validations,
)
from support.tiny_run import PAIRS, STEPS, TinyRun

pytestmark = pytest.mark.distributed

SGD = ("sgd-micro4-1", "sgd-pack128-1", "sgd-2", "sgd-4")
"""Against sgd-1: micro_batch 4 in one micro-batch; 2 of 128 tokens; 2 ranks of micro_batch 2; 4 ranks."""
ADAMW = ("adamw-micro4-1", "adamw-pack128-1", "adamw-2", "adamw-4")


@pytest.fixture
def runs(request: pytest.FixtureRequest, world_1: TinyRun) -> TinyRun:
    """The world that the test's parameter `name` was made in has run, and that of one rank."""
    name = request.node.callspec.params["name"]
    world: TinyRun = request.getfixturevalue(f"world_{name[-1]}")
    return world if name[-1] != "1" else world_1


def assert_same(runs: TinyRun, name: str, reference: str, steps: int, tolerance: float) -> None:
    expected = runs.run(reference)
    assert len(metrics(expected)) == steps
    assert set(validations(expected)[-1]["valid_loss"]) == set(PAIRS)
    assert_same_training(runs.run(name), expected, tolerance)


@pytest.mark.parametrize("name", SGD)
def test_sgd_without_clipping(runs: TinyRun, name: str) -> None:
    assert_same(runs, name, "sgd-1", STEPS, 1e-5)


@pytest.mark.parametrize("name", ADAMW)
def test_adamw_with_clipping_that_bites(runs: TinyRun, name: str) -> None:
    assert_same(runs, name, "adamw-1", STEPS, 1e-4)


@pytest.mark.parametrize("name", ["few-4"])
def test_more_micro_batches_than_examples(runs: TinyRun, name: str) -> None:
    """Ranks without an example of their own change nothing, in the budget loss least of all."""
    records = metrics(runs.run("few-1"))
    assert min(record["examples"] for record in records) < 4
    assert all(record["budget_loss"] > 0 for record in records)
    assert_same(runs, name, "few-1", STEPS, 1e-4)


def test_these_trainings_are_worth_comparing(world_1: TinyRun) -> None:
    for name in ("sgd-1", "adamw-1"):
        records = metrics(world_1.run(name))
        assert all(len(record["loss_per_pair"]) > 1 for record in records), "every batch mixes pairs"
        assert records[-1]["alpha"] == pytest.approx(1.0)
        assert all(record["budget_loss"] > 0 for record in records)
        assert records[-1]["loss"] < records[0]["loss"] - 0.1
    assert min(record["grad_norm"] for record in metrics(world_1.run("adamw-1"))) > 0.2, (
        "clipping always bites"
    )
    gate = {
        name: value for name, value in trained(world_1.run("sgd-1")).items() if name.endswith("router.w2")
    }
    assert norm(gate) > 0.01, "gates have moved from their zero"


@pytest.mark.parametrize("name", ["lora-2", "shira-2"])
def test_adapters_too(runs: TinyRun, name: str) -> None:
    assert_same(runs, name, name.replace("2", "1"), 4, 1e-5)


def test_validating_on_the_way_changes_nothing(world_2: TinyRun) -> None:
    """sgd-2, which agrees with sgd-1, has validated in between and sgd-1 has not."""
    assert [record["step"] for record in validations(world_2.run("sgd-2"))] == [4, STEPS]


@pytest.mark.parametrize("name", ["detect-large-1", "detect-2", "detect-4"])
def test_awareness(runs: TinyRun, name: str) -> None:
    assert_same_awareness(runs.run(name), runs.run("detect-1"))
