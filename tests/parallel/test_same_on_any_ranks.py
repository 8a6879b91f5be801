"""The same run on 1, 2 and 4 ranks, with any micro-batch and packing: same losses, weights and awareness."""

from __future__ import annotations

import pytest
import torch
from support.compare import distance, metrics, norm, relative, trained, validations
from support.tiny_run import PAIRS, TinyRun

from lander_ds.awareness.awareness import STATISTICS, Awareness

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
    run, expected = runs.run(name), runs.run(reference)
    found, wanted = metrics(run), metrics(expected)
    assert len(wanted) == steps
    assert relative([r["loss"] for r in found], [r["loss"] for r in wanted]) < tolerance
    for pair in PAIRS:
        losses = [[r["loss_per_pair"].get(pair, 1.0) for r in records] for records in (found, wanted)]
        assert relative(*losses) < tolerance
    assert relative([r["grad_norm"] for r in found], [r["grad_norm"] for r in wanted]) < 1e-4
    assert relative([r["budget_loss"] for r in found], [r["budget_loss"] for r in wanted]) < 1e-4
    for one, other in zip(found, wanted, strict=True):
        assert one["gates"].keys() == other["gates"].keys()
        for layer, gates in one["gates"].items():
            assert gates == pytest.approx(other["gates"][layer], rel=1e-4)
    assert distance(trained(run), trained(expected)) < tolerance
    last, wanted_last = validations(run)[-1], validations(expected)[-1]
    assert last["valid_loss"] == pytest.approx(wanted_last["valid_loss"], rel=tolerance)
    assert set(last["valid_loss"]) == set(PAIRS)


@pytest.mark.parametrize("name", SGD)
def test_sgd_without_clipping(runs: TinyRun, name: str) -> None:
    assert_same(runs, name, "sgd-1", 20, 1e-5)


@pytest.mark.parametrize("name", ADAMW)
def test_adamw_with_clipping_that_bites(runs: TinyRun, name: str) -> None:
    assert_same(runs, name, "adamw-1", 20, 1e-4)


@pytest.mark.parametrize("name", ["few-4"])
def test_more_micro_batches_than_examples(runs: TinyRun, name: str) -> None:
    """Ranks without an example of their own change nothing, in the budget loss least of all."""
    records = metrics(runs.run("few-1"))
    assert min(record["examples"] for record in records) < 4
    assert all(record["budget_loss"] > 0 for record in records)
    assert_same(runs, name, "few-1", 6, 1e-4)


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


@pytest.mark.parametrize("name", ["lora-2"])
def test_lora_too(runs: TinyRun, name: str) -> None:
    assert_same(runs, name, "lora-1", 6, 1e-5)


def test_validating_on_the_way_changes_nothing(world_2: TinyRun) -> None:
    """sgd-2, which agrees with sgd-1, has validated in between and sgd-1 has not."""
    assert [record["step"] for record in validations(world_2.run("sgd-2"))] == [7, 14, 20]


@pytest.mark.parametrize("name", ["detect-large-1", "detect-2", "detect-4"])
def test_awareness(runs: TinyRun, name: str) -> None:
    found = Awareness.load(runs.run(name).awareness)
    expected = Awareness.load(runs.run("detect-1").awareness)
    assert found.metadata == expected.metadata
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.active, expected.active)
    assert expected.phi().min() > 0
    for statistic in STATISTICS:
        one, other = getattr(found, statistic), getattr(expected, statistic)
        scale = other.abs() if statistic != "sum_h" else expected.sum_abs_h
        assert ((one - other).abs() / scale.clamp_min(1e-12)).max() < 1e-5, statistic
