"""Every other topology trains, detects and translates as zero3 does on one rank."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.compare import (
    assert_same_awareness,
    assert_same_training,
    distance,
    metrics,
    relative,
    trained,
    validations,
)
from support.jobs import NOTES, WATCHED, gathered
from support.tiny_run import NEURONS, PAIRS, SELECTED, STEPS, WIDTH, TinyRun
from support.training_runs import HAS_BITSANDBYTES

from lander_ds.checkpoint import checkpoint
from lander_ds.common.run_directory import RunDirectory
from lander_ds.method.awareness import Awareness
from lander_ds.method.selection import Selection

pytestmark = pytest.mark.distributed

PIPELINES = ("pipeline", "pipeline_zero3")
TWO = (("replicated", "1x2"), *((topology, "2x1") for topology in PIPELINES))
SHARED = (("replicated", "1x4"), *((topology, "2x2") for topology in PIPELINES))
"""Data-parallel ranks, and stages where there are any."""
ALL = (*TWO, *SHARED, *((topology, "4x1") for topology in PIPELINES))
every_grid = pytest.mark.parametrize(("topology", "grid"), ALL)
on_two_ranks = pytest.mark.parametrize(("topology", "grid"), TWO)
QUANTISED = tuple(grid for grid in TWO if grid[0] != "pipeline_zero3")
needs_bitsandbytes = pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed")
on_shared_stages = pytest.mark.parametrize(("topology", "grid"), SHARED)
in_pipelines = pytest.mark.parametrize("topology", PIPELINES)
FLOAT = 4
ADAM_BYTES = 12
"""Master, first and second moment of a trained parameter."""
LAYERS = 4


@pytest.fixture
def runs(request: pytest.FixtureRequest, world_1: TinyRun) -> TinyRun:
    """The world of the test's parameter `grid` has run, and that of one rank; two stages of one rank without one."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    stages, data_ranks = _sizes(parameters.get("grid", "2x1"))
    world: TinyRun = request.getfixturevalue(f"stages_{stages * data_ranks}")
    assert world.root == world_1.root
    return world


def _sizes(grid: str) -> tuple[int, int]:
    stages, data_ranks = grid.split("x")
    return int(stages), int(data_ranks)


def name_of(topology: str, grid: str, what: str) -> str:
    stages, data_ranks = _sizes(grid)
    return f"{topology}-{grid}-{what}-{stages * data_ranks}"


def summary(runs: TinyRun, name: str) -> dict[str, Any]:
    actual: dict[str, Any] = json.loads(runs.run(name).training_summary.read_text())
    return actual


@every_grid
def test_sgd_without_clipping(runs: TinyRun, topology: str, grid: str) -> None:
    """On 2x1 with other micro-batches and packing, and with validations on the way."""
    assert_same_training(runs.run(name_of(topology, grid, "sgd")), runs.run("sgd-1"), 1e-5)


@every_grid
def test_adamw_with_clipping_that_bites(runs: TinyRun, topology: str, grid: str) -> None:
    assert_same_training(runs.run(name_of(topology, grid, "adamw")), runs.run("adamw-1"), 1e-4)


@on_two_ranks
@pytest.mark.parametrize(
    ("what", "tolerance"),
    [
        ("none", 1e-4),
        ("output", 1e-5),
        ("layers", 1e-4),
        ("lora", 1e-4),
        ("shira", 1e-4),
        ("full", 1e-4),
        ("lower", 1e-4),
        ("replay", 1e-4),
        ("cpo", 1e-4),
    ],
)
def test_every_method_and_gate(runs: TinyRun, topology: str, grid: str, what: str, tolerance: float) -> None:
    """`lower` trains one layer of the first stage: the last stage has nothing to train but the loss."""
    assert_same_training(runs.run(name_of(topology, grid, what)), runs.run(f"{what}-1"), tolerance)


@on_shared_stages
def test_data_parallel_ranks_without_an_example(runs: TinyRun, topology: str, grid: str) -> None:
    assert min(record["examples"] for record in metrics(runs.run("few-1"))) < 2
    assert_same_training(runs.run(name_of(topology, grid, "few")), runs.run("few-1"), 1e-4)


def test_recomputation_changes_nothing_on_one_rank(world_1: TinyRun) -> None:
    assert_same_training(world_1.run("recompute-1"), world_1.run("adamw-1"), 1e-6)


@pytest.mark.parametrize(("topology", "grid"), [*TWO, *((topology, "2x2") for topology in PIPELINES)])
def test_recomputation_changes_nothing_on_several(runs: TinyRun, topology: str, grid: str) -> None:
    actual, expected = (runs.run(name_of(topology, grid, what)) for what in ("recompute", "adamw"))
    assert_same_training(actual, expected, 1e-6)


@every_grid
def test_awareness(runs: TinyRun, topology: str, grid: str) -> None:
    assert_same_awareness(runs.run(name_of(topology, grid, "detect")), runs.run("detect-1"))


@on_two_ranks
def test_validating_on_the_way(runs: TinyRun, topology: str, grid: str) -> None:
    run = runs.run(name_of(topology, grid, "sgd"))
    assert [record["step"] for record in validations(run)] == [4, STEPS]


@every_grid
def test_every_rank_holds_its_part(runs: TinyRun, topology: str, grid: str) -> None:
    stages, data_ranks = _sizes(grid)
    actual = summary(runs, name_of(topology, grid, "adamw"))
    assert (actual["topology"], actual["ranks"]) == (topology, stages * data_ranks)
    spans = actual["layers_per_rank"]
    assert [span[0] for span in spans[::data_ranks]] == [0, *(span[1] for span in spans[::data_ranks][:-1])]
    assert spans == [span for span in spans[::data_ranks] for _ in range(data_ranks)]
    assert spans[-1][1] == LAYERS
    base = load_file(runs.model / "model.safetensors")
    gates = actual["groups"]["gates"] // len(SELECTED)
    banked = {
        layer.layer: 3 * WIDTH * sum(bank.size for bank in layer.banks if bank.kind != "frozen")
        for layer in runs.selection().layers
    }
    assert sum(banked.values()) + gates * len(SELECTED) == actual["trained_parameters"]
    shards = data_ranks if topology == "pipeline_zero3" else 1
    for rank, (start, stop) in enumerate(spans):
        names = [f"model.layers.{layer}." for layer in range(start, stop)]
        names += ["model.embed_tokens."] if start == 0 or stop == LAYERS else []
        names += ["model.norm."] if stop == LAYERS else []
        whole = sum(tensor.numel() for name, tensor in base.items() if name.startswith(tuple(names)))
        routed = [layer for layer in SELECTED if start <= layer < stop]
        weights = whole + len(routed) * gates
        learned = sum(banked[layer] + gates for layer in routed)
        assert actual["weight_bytes_per_rank"][rank] == pytest.approx(FLOAT * weights / shards, rel=0.05)
        share = learned if topology != "pipeline_zero3" else learned / shards
        assert actual["gradient_bytes_per_rank"][rank] == pytest.approx(FLOAT * share, rel=0.03)
        states = ADAM_BYTES * learned / data_ranks
        assert actual["optimizer_bytes_per_rank"][rank] == pytest.approx(states, rel=0.03)
    assert actual["frozen_unchanged"] is True


@in_pipelines
@pytest.mark.parametrize("grid", ["4x1"])
def test_stages_that_train_nothing_hold_no_optimizer(runs: TinyRun, topology: str, grid: str) -> None:
    for what in ("sgd", "adamw"):
        actual = summary(runs, name_of(topology, grid, what))
        assert actual["layers_per_rank"] == [[layer, layer + 1] for layer in range(LAYERS)]
        for name in ("gradient_bytes_per_rank", "optimizer_bytes_per_rank"):
            assert [holding > 0 for holding in actual[name]] == [layer in SELECTED for layer in range(LAYERS)]


@in_pipelines
def test_a_cut_by_hand(runs: TinyRun, topology: str) -> None:
    actual = summary(runs, name_of(topology, "2x1", "lower"))
    assert actual["layers_per_rank"] == [[0, 2], [2, 4]]
    assert actual["optimizer_bytes_per_rank"][1] == actual["gradient_bytes_per_rank"][1] == 0
    assert actual["frozen_unchanged"] is True


@in_pipelines
def test_layers_are_balanced_by_compute(runs: TinyRun, topology: str) -> None:
    """The last stage has the head, which weighs nearly a layer; without a backward pass layer 0 is cheap."""
    assert summary(runs, name_of(topology, "2x1", "adamw"))["layers_per_rank"] == [[0, 3], [3, 4]]
    assert summary(runs, name_of(topology, "2x1", "full"))["layers_per_rank"] == [[0, 2], [2, 4]]


@on_two_ranks
def test_frozen_weights_stay_bitwise_what_they_were(runs: TinyRun, topology: str, grid: str) -> None:
    name = name_of(topology, grid, "output")
    base, after = load_file(runs.model / "model.safetensors"), gathered(runs.run(name))
    if topology in PIPELINES:
        assert torch.equal(after["lm_head.weight"], base["model.embed_tokens.weight"]), "the head's own copy"
    for tensor, value in base.items():
        if not any(f"layers.{layer}.mlp" in tensor for layer in SELECTED):
            assert torch.equal(after[tensor], value), tensor
    roles = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    moved: set[str] = set()
    same: set[str] = set()
    for layer in runs.selection().layers:
        prefix, neurons = f"model.layers.{layer.layer}.mlp", layer.slices()
        assert sum(map(len, neurons)) == NEURONS
        for number, bank in enumerate(layer.banks):
            for role, projection in roles.items():
                weight = base[f"{prefix}.{projection}.weight"]
                before = weight[:, neurons[number]] if role == "down" else weight[neurons[number]]
                equal = torch.equal(after[f"{prefix}.banks.{number}.{role}"], before)
                (same if equal else moved).add(bank.kind)
    assert (same, moved) == ({"frozen", "general"}, {"specific"})
    assert summary(runs, name)["frozen_unchanged"] is True


@on_two_ranks
def test_layers_trains_the_whole_ffns_and_nothing_else(runs: TinyRun, topology: str, grid: str) -> None:
    base = load_file(runs.model / "model.safetensors")
    after = gathered(runs.run(name_of(topology, grid, "layers")))
    assert {name for name in base if not torch.equal(after[name], base[name])} == {
        f"model.layers.{layer}.mlp.{projection}.weight"
        for layer in SELECTED
        for projection in ("gate_proj", "up_proj", "down_proj")
    }
    assert summary(runs, name_of(topology, grid, "layers"))["groups"] == {"dense": 2 * 3 * WIDTH * NEURONS}


@on_two_ranks
def test_a_frozen_weight_that_changes_by_one_bit_is_noticed(runs: TinyRun, topology: str, grid: str) -> None:
    assert summary(runs, name_of(topology, grid, "nudged"))["frozen_unchanged"] is False


@on_two_ranks
def test_inactive_groups_stay_bitwise(runs: TinyRun, topology: str, grid: str) -> None:
    """Both ranks have a part of every group."""
    notes = json.loads((runs.run(name_of(topology, grid, "none")).path / WATCHED).read_text())
    used: set[str] = set()
    idle_after_use = 0
    for note in notes:
        assert note["changed"] == note["active"]
        idle_after_use += len((set(note["groups"]) - set(note["changed"])) & used)
        used |= set(note["changed"])
    assert idle_after_use > 0
    assert used == set(notes[0]["groups"])


@on_two_ranks
def test_bfloat16_weights_float32_optimizer(runs: TinyRun, topology: str, grid: str) -> None:
    name = name_of(topology, grid, "bfloat16")
    actual = summary(runs, name)
    assert sum(actual["optimizer_bytes_per_rank"]) == pytest.approx(
        ADAM_BYTES * actual["trained_parameters"], rel=0.03
    )
    # In pipelines the last stage has a copy of the head, which is tied.
    everything = actual["total_parameters"]
    held = 2 * everything if topology == "replicated" else everything + 480 * WIDTH
    assert sum(actual["weight_bytes_per_rank"]) == pytest.approx(2 * held, rel=0.05)
    assert actual["frozen_unchanged"] is True
    run, expected = runs.run(name), runs.run("bfloat16-1")
    for key in ("loss", "grad_norm"):
        assert relative([r[key] for r in metrics(run)], [r[key] for r in metrics(expected)]) < 0.02, key
    assert distance(trained(run), trained(expected)) < 0.02
    # Steps smaller than bfloat16 can hold are in the float32 masters.
    assert any(not torch.equal(value, value.bfloat16().float()) for value in trained(run).values())
    notes = json.loads((runs.run(name_of(topology, grid, "looked-into")).path / NOTES).read_text())
    assert notes["parameters"] == ["torch.bfloat16"]
    assert notes["rotary"] == ["torch.float32"], "in bfloat16 far positions would move"
    assert set(notes["all"]) == set(PAIRS)
    assert set(notes["one"]) == set(notes["few"]) == {"en-es"}
    assert notes["one"]["en-es"] == pytest.approx(notes["all"]["en-es"], rel=1e-2)


@pytest.mark.parametrize(("topology", "grid"), [*TWO, ("pipeline_zero3", "2x2")])
def test_every_stage_in_one_process_group_ends_in_the_same_translations(
    runs: TinyRun, topology: str, grid: str
) -> None:
    """From data to report without a stop: with sharded weights on two ranks, with whole ones on four and on one."""
    run, expected = runs.run(name_of(topology, grid, "whole")), runs.run("whole-1")
    assert_same_stages(run, expected)


def test_every_stage_with_a_mixture_of_experts_in_a_pipeline(runs: TinyRun) -> None:
    assert_same_stages(runs.run("pipeline-2x1-experts-2"), runs.run("experts-1"))


def test_every_stage_with_a_mixture_of_experts_whose_weights_are_sharded(
    world_1: TinyRun, world_2: TinyRun
) -> None:
    assert_same_stages(world_2.run("experts-2"), world_1.run("experts-1"))


def assert_same_stages(run: RunDirectory, expected: RunDirectory) -> None:
    """Same detection, selection, training, translations and export."""
    assert_same_awareness(run, expected)
    one, other = Selection.load(run.selection), Selection.load(expected.selection)
    assert [layer.banks for layer in one.layers] == [layer.banks for layer in other.layers]
    assert_same_training(run, expected, 1e-4)
    texts = {
        (system, r.path.name): [(r.translations / system / f"{pair}.jsonl").read_text() for pair in PAIRS]
        for system in ("base", "trained")
        for r in (run, expected)
    }
    for system in ("base", "trained"):
        assert texts[system, run.path.name] == texts[system, expected.path.name]
    assert texts["trained", run.path.name] != texts["base", run.path.name]
    assert Awareness.load(run.awareness).pairs == PAIRS
    tensors = load_file(run.path / "export" / "dense" / "model.safetensors")
    for name, value in load_file(expected.path / "export" / "dense" / "model.safetensors").items():
        torch.testing.assert_close(tensors[name], value, atol=1e-4, rtol=1e-3)


@on_two_ranks
def test_divergence_ends_with_an_error_on_every_rank(runs: TinyRun, topology: str, grid: str) -> None:
    run = runs.run(name_of(topology, grid, "diverged"))
    for rank in range(2):
        message = (run.path / f"{rank}-{NOTES}").read_text()
        assert re.search(
            r"the loss of .*en-.* is not finite at step \d+, after 3 skipped steps: lower train\.lr", message
        )
    assert checkpoint.newest(run.checkpoints).trained()
    assert not run.training_summary.exists()


@on_two_ranks
def test_every_trained_tensor_is_in_the_checkpoint_once(runs: TinyRun, topology: str, grid: str) -> None:
    for what in ("adamw", "lower", "lora"):
        run = runs.run(name_of(topology, grid, what))
        path = checkpoint.newest(run.checkpoints).path
        names = [name for part in path.glob("trained-*.safetensors") for name in load_file(part)]
        assert len(set(names)) == len(names)
        assert set(names) == set(trained(runs.run(f"{what}-1")))


def test_each_topology_goes_on_from_the_checkpoint_of_another(runs: TinyRun) -> None:
    run, expected = runs.run("relay-2"), runs.run("relayed-1")
    assert checkpoint.newest(run.checkpoints).state["topology"] == "pipeline"
    assert_same_training(run, expected, 1e-4)


def test_with_kept_hidden_states(runs: TinyRun, world_2: TinyRun) -> None:
    """zero3 has computed them, or replicated, whichever was first; the other has read them."""
    assert_same_training(runs.run("replicated-1x2-cached-2"), runs.run("replicated-1x2-adamw-2"), 1e-6)
    assert_same_training(world_2.run("cached-2"), world_2.run("adamw-2"), 1e-6)
    entries = list((runs.root / "cache").glob("prefix-*"))
    assert len(entries) == 2, "one for both, and one with the texts of the job `replay`"
    assert [len(list(entry.glob("part-*.bin"))) for entry in entries] == [2, 2]


@needs_bitsandbytes
@pytest.mark.parametrize(("topology", "grid"), QUANTISED)
def test_every_stage_with_a_quantised_base(runs: TinyRun, topology: str, grid: str) -> None:
    """Same detection, training and translations as on one rank; an export is the base but for the trained neurons."""
    run, expected = runs.run(name_of(topology, grid, "nf4")), runs.run("nf4-1")
    assert_same_awareness(run, expected)
    assert_same_training(run, expected, 1e-4)
    for pair in PAIRS:
        texts = [(r.translations / "trained" / f"{pair}.jsonl").read_text() for r in (run, expected)]
        assert texts[0] == texts[1]
    unquantised = runs.run(name_of(topology, grid, "whole"))
    assert (run.translations / "base" / "en-de.jsonl").read_text() == (
        unquantised.translations / "base" / "en-de.jsonl"
    ).read_text(), "translations are of the unquantised base"
    actual, plain = summary(runs, run.path.name), summary(runs, unquantised.path.name)
    assert actual["frozen_unchanged"] is True
    assert actual["total_parameters"] == plain["total_parameters"]
    assert max(actual["weight_bytes_per_rank"]) < max(plain["weight_bytes_per_rank"])
    base, after = (
        load_file(path / "model.safetensors") for path in (runs.model, run.path / "export" / "dense")
    )
    trained_rows = {
        f"model.layers.{layer.layer}.mlp": torch.cat(
            [n for bank, n in zip(layer.banks, layer.slices(), strict=True) if bank.kind != "frozen"]
        )
        for layer in Selection.load(run.selection).layers
    }
    moved = 0
    for name, value in base.items():
        neurons = trained_rows.get(
            name.rpartition(".")[0].rpartition(".")[0], torch.tensor([], dtype=torch.int64)
        )
        by_neuron = (1, 0) if "down_proj" in name else (0, 1)
        changed = (
            (after[name] != value).permute(by_neuron).any(1) if value.dim() == 2 else after[name] != value
        )
        assert set(changed.nonzero().flatten().tolist()) <= set(neurons.tolist()), name
        moved += int(changed.sum())
    assert moved > 0


@needs_bitsandbytes
@pytest.mark.parametrize(("topology", "grid"), QUANTISED)
def test_adapters_on_a_quantised_base(runs: TinyRun, topology: str, grid: str) -> None:
    assert_same_training(runs.run(name_of(topology, grid, "int8-lora")), runs.run("int8-lora-1"), 1e-4)


@needs_bitsandbytes
def test_a_quantised_training_goes_on_in_another_topology(runs: TinyRun) -> None:
    assert_same_training(runs.run("relay-nf4-2"), runs.run("relayed-nf4-1"), 1e-4)
