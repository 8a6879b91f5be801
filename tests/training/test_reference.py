"""Trainings on two ranks against the method in plain PyTorch (support/reference.py)."""

from __future__ import annotations

import pytest
from support.compare import distance, metrics, norm, relative, trained
from support.reference import Reference
from support.tiny_run import TinyRun
from support.training_runs import JOBS

from lander_ds.data.prepared import PreparedData

pytestmark = pytest.mark.distributed

OVERRIDES = {job.name: job.overrides for job in JOBS[2]}


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("none", 1e-4), ("input", 1e-4), ("output", 1e-5), ("layers", 1e-4), ("full", 1e-4)],
)
def test_losses_gradients_and_weights(world_2: TinyRun, name: str, tolerance: float) -> None:
    recipe, run = world_2.recipe(f"{name}-2", *OVERRIDES[name]), world_2.run(f"{name}-2")
    reference = Reference(recipe, PreparedData.load(run, recipe), world_2.selection())
    base = {key: value.clone() for key, value in reference.weights().items()}
    expected, actual = reference.train(), metrics(run)
    weights = reference.weights()
    assert len(actual) == recipe.train.steps
    for record, wanted in zip(actual, expected, strict=True):
        assert record["loss_per_pair"] == pytest.approx(wanted["loss_per_pair"], rel=tolerance)
        gates = {f"{layer} {pair}": c for layer, of in record["gates"].items() for pair, c in of.items()}
        assert gates == pytest.approx(wanted["gates"], rel=1e-5)
    for key in ("loss", "grad_norm", "budget_loss"):
        assert relative([r[key] for r in actual], [r[key] for r in expected]) < tolerance, key
    assert distance(trained(run), weights) < tolerance
    # What training changed must agree too, not only what it started from.
    change = {key: weights[key] - base[key] for key in base}
    assert norm(change) > 0.005 * norm(weights)
    assert distance({key: value - base[key] for key, value in trained(run).items()}, change) < 10 * tolerance


def test_batches_without_a_pair_were_among_them(world_2: TinyRun) -> None:
    records = metrics(world_2.run("none-2"))
    seen = [set(record["loss_per_pair"]) for record in records]
    assert set.union(*seen) == {"en-de", "en-fr", "en-es"}
    # en-de is away after it has gathered momentum, and comes back.
    here = ["en-de" in pairs for pairs in seen]
    first = here.index(True)
    assert False in here[first:]
    assert True in here[here.index(False, first) :]
