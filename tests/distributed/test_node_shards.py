"""Frozen weights sharded inside a node: the same training, and none of them travels between nodes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.compare import metrics, trained
from support.jobs import gathered
from support.nodes import TRAFFIC, OnNodes
from support.tiny_run import TinyRun
from support.training_runs import DETECT, GATHER, RELAYED
from support.worlds import Job, run_world

from lander_ds.distributed.nodes import by_node, this_node
from lander_ds.method.awareness import Awareness

COUNT = "support.nodes:train_and_count"
TRAINED = (*RELAYED, "train.steps=4")
NODE = "frozen_shards=node"
STAGES = (*TRAINED, "topology=pipeline_zero3", "pipeline_stages=2")
TRANSLATED = (
    *("train.steps=2", "translate.systems=[trained]"),
    *("translate.weights=sharded", "translate.max_new_tokens=8", "translate.limit=2"),
)
TRANSLATE = "support.jobs:train_and_translate"
JOBS = (
    OnNodes(Job("world", TRAINED, COUNT)),
    OnNodes(Job("node", (*TRAINED, NODE), COUNT)),
    # A node of three ranks, and one of a single one.
    OnNodes(Job("uneven", (*TRAINED, NODE), GATHER), "aaab"),
    OnNodes(Job("resumed", (*TRAINED, NODE), "support.nodes:train_in_two_goes")),
    OnNodes(Job("detect-world", (), DETECT)),
    OnNodes(Job("detect-node", (NODE,), DETECT)),
    OnNodes(Job("translate-world", TRANSLATED, TRANSLATE)),
    OnNodes(Job("translate-node", (*TRANSLATED, NODE), TRANSLATE)),
    OnNodes(Job("stages-world", STAGES)),
    # Every stage has a rank on both nodes.
    OnNodes(Job("stages-node", (*STAGES, NODE)), "abab"),
)
FLOAT = 4


@pytest.fixture(scope="module")
def runs(tiny_run: TinyRun) -> TinyRun:
    """All jobs have run on four ranks, most of them on two nodes of two."""
    run_world(tiny_run.root, 4, JOBS)
    return tiny_run


def summary(runs: TinyRun, name: str) -> dict[str, Any]:
    actual: dict[str, Any] = json.loads(runs.run(name).training_summary.read_text())
    return actual


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "expected"),
    [("node", "world"), ("uneven", "world"), ("resumed", "world"), ("stages-node", "stages-world")],
)
def test_bit_for_bit_the_same_training(runs: TinyRun, name: str, expected: str) -> None:
    actual, wanted = runs.run(f"{name}-4"), runs.run(f"{expected}-4")
    for one, other in zip(metrics(actual), metrics(wanted), strict=True):
        assert one.keys() == other.keys()
        assert all(one[key] == value for key, value in other.items() if "second" not in key)
    weights = trained(wanted)
    assert all(torch.equal(value, weights[tensor]) for tensor, value in trained(actual).items())
    assert summary(runs, f"{name}-4")["frozen_unchanged"] is True


@pytest.mark.distributed
def test_no_frozen_weight_travels_between_nodes(runs: TinyRun) -> None:
    world, node = (
        json.loads((runs.run(f"{name}-4").path / TRAFFIC).read_text()) for name in ("world", "node")
    )
    for before, after in zip(world, node, strict=True):
        assert before["frozen"] > before["trained"] > 0
        assert (after["frozen"], after["trained"]) == (0, before["trained"])
        for traffic in (before, after):
            assert traffic["on_the_wire"] == traffic["frozen"] + traffic["trained"]


@pytest.mark.distributed
def test_every_node_holds_frozen_weights_once(runs: TinyRun) -> None:
    base = load_file(runs.model / "model.safetensors")
    for name, ranks in (("node-4", (2, 2, 2, 2)), ("uneven-4", (3, 3, 3, 1))):
        actual = summary(runs, name)
        learned = actual["trained_parameters"]
        frozen = actual["total_parameters"] - learned
        expected = [FLOAT * (frozen / shared + learned / 4) for shared in ranks]
        assert actual["weight_bytes_per_rank"] == pytest.approx(expected, rel=0.02)
        for part in ("gradient_bytes_per_rank", "optimizer_bytes_per_rank"):
            assert actual[part] == summary(runs, "world-4")[part]
    after = gathered(runs.run("uneven-4"))
    assert all(torch.equal(after[name], base[name]) for name in base if name in after and "mlp" not in name)


@pytest.mark.distributed
def test_detection_and_translation(runs: TinyRun) -> None:
    detected = {
        Awareness.load(runs.run(f"detect-{name}-4").awareness).content_hash() for name in ("node", "world")
    }
    assert len(detected) == 1
    own, expected = (runs.run(f"translate-{name}-4").path / "translations" for name in ("node", "world"))
    files = [path.relative_to(expected) for path in expected.rglob("*.jsonl")]
    assert len(files) == 3
    assert all((own / path).read_text() == (expected / path).read_text() for path in files)


def test_ranks_of_a_node_in_any_order() -> None:
    assert by_node([("a", 0), ("b", 0), ("a", 0), ("b", 0), ("b", 0)]) == ((0, 2), (1, 3, 4))
    assert by_node([("a", 0), ("a", 0), ("a", 1), ("b", 1)]) == ((0, 1), (2,), (3,))
    assert this_node() == this_node() != ""
