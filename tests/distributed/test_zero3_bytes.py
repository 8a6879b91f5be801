"""What each rank holds, and that what is frozen stays bit for bit."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.jobs import NOTES, gathered
from support.tiny_run import NEURONS, SELECTED, TinyRun

pytestmark = pytest.mark.distributed

FLOAT = 4
ADAM_BYTES = 12
"""Master, first and second moment of a trained parameter."""


def summary(runs: TinyRun, name: str) -> dict[str, Any]:
    actual: dict[str, Any] = json.loads(runs.run(name).training_summary.read_text())
    return actual


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_rank_holds_its_share(request: pytest.FixtureRequest, ranks: int) -> None:
    runs: TinyRun = request.getfixturevalue(f"world_{ranks}")
    actual = summary(runs, f"adamw-{ranks}")
    trained, total = actual["trained_parameters"], actual["total_parameters"]
    base = sum(tensor.numel() for tensor in load_file(runs.model / "model.safetensors").values())
    gates = actual["groups"]["gates"]
    assert actual["ranks"] == ranks
    assert total == base + gates, "tied embeddings count once"
    assert trained == sum(actual["groups"].values())
    for name, expected, tolerance in (
        ("optimizer_bytes_per_rank", ADAM_BYTES * trained / ranks, 0.02),
        ("gradient_bytes_per_rank", FLOAT * trained / ranks, 0.02),
        ("weight_bytes_per_rank", FLOAT * total / ranks, 0.05),
    ):
        assert len(actual[name]) == ranks
        assert actual[name] == pytest.approx([expected] * ranks, rel=tolerance), name
    # A process that has imported torch, and no more than a test machine has.
    peaks = actual["peak_memory_bytes_per_rank"]
    assert len(peaks) == ranks
    assert all(1e7 < peak < 2e10 for peak in peaks)


def test_bfloat16_weights_float32_optimizer(world_2: TinyRun) -> None:
    actual = summary(world_2, "bfloat16-2")
    assert actual["optimizer_bytes_per_rank"] == pytest.approx(
        [ADAM_BYTES * actual["trained_parameters"] / 2] * 2, rel=0.02
    )
    assert actual["weight_bytes_per_rank"] == pytest.approx(
        [2 * actual["total_parameters"] / 2] * 2, rel=0.05
    )
    assert actual["frozen_unchanged"] is True
    notes = json.loads((world_2.run("looked-into-2").path / NOTES).read_text())
    assert notes["parameters"] == ["torch.bfloat16"]
    assert notes["rotary"] == ["torch.float32"], "in bfloat16 far positions would move"


def test_sgd_keeps_no_moments(world_2: TinyRun) -> None:
    actual = summary(world_2, "sgd-2")
    expected = FLOAT * actual["trained_parameters"] / 2
    assert actual["optimizer_bytes_per_rank"] == pytest.approx([expected] * 2, rel=0.02)


@pytest.mark.parametrize("name", ["none-2", "input-2", "output-2"])
def test_frozen_weights_stay_bitwise_what_they_were(world_2: TinyRun, name: str) -> None:
    base = load_file(world_2.model / "model.safetensors")
    after = gathered(world_2.run(name))
    selection = world_2.selection()
    roles = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    moved: set[str] = set()
    same: set[str] = set()
    for tensor in base:
        if not any(f"layers.{layer}.mlp" in tensor for layer in SELECTED):
            assert torch.equal(after[tensor], base[tensor]), tensor
    for layer in selection.layers:
        prefix, neurons = f"model.layers.{layer.layer}.mlp", layer.slices()
        assert sum(map(len, neurons)) == NEURONS
        for number, bank in enumerate(layer.banks):
            for role, projection in roles.items():
                weight = base[f"{prefix}.{projection}.weight"]
                before = weight[:, neurons[number]] if role == "down" else weight[neurons[number]]
                equal = torch.equal(after[f"{prefix}.banks.{number}.{role}"], before)
                (same if equal else moved).add(bank.kind)
    general = {"frozen", "general"} if name == "output-2" else {"frozen"}
    assert same == general
    assert moved == {"general", "specific", "frozen"} - general
    assert summary(world_2, name)["frozen_unchanged"] is True


def test_a_frozen_weight_that_changes_by_one_bit_is_noticed(world_2: TinyRun) -> None:
    assert summary(world_2, "nudged-2")["frozen_unchanged"] is False


def test_layers_trains_the_whole_ffns_and_nothing_else(world_2: TinyRun) -> None:
    base = load_file(world_2.model / "model.safetensors")
    after = gathered(world_2.run("layers-2"))
    changed = {name for name in base if not torch.equal(after[name], base[name])}
    assert changed == {
        f"model.layers.{layer}.mlp.{projection}.weight"
        for layer in SELECTED
        for projection in ("gate_proj", "up_proj", "down_proj")
    }
    assert summary(world_2, "layers-2")["groups"] == {"dense": 2 * 3 * 32 * NEURONS}


def test_lora_trains_adapters_and_nothing_else(world_2: TinyRun) -> None:
    base = load_file(world_2.model / "model.safetensors")
    after = gathered(world_2.run("lora-2"))
    adapters = {name for name in after if ".lora_" in name}
    assert len(adapters) == 2 * 4 * 7, "A and B of seven projections in four layers"
    assert {name.replace(".base_layer", "") for name in after} - adapters == set(base)
    for name, tensor in after.items():
        if name not in adapters:
            assert torch.equal(tensor, base[name.replace(".base_layer", "")]), name
    assert all(tensor.abs().max() > 0 for name, tensor in after.items() if ".lora_B." in name)
    assert summary(world_2, "lora-2")["frozen_unchanged"] is True


def test_shira_trains_its_entries_and_nothing_else(world_2: TinyRun) -> None:
    base = load_file(world_2.model / "model.safetensors")
    after = gathered(world_2.run("shira-2"))
    entries = {name for name in after if name.endswith("shira_entries")}
    assert len(entries) == 4 * 7, "seven projections in four layers"
    assert set(after) - entries == set(base)
    assert all(torch.equal(after[name], base[name]) for name in base)
    assert summary(world_2, "shira-2")["groups"] == {"shira": sum(after[name].numel() for name in entries)}
    assert summary(world_2, "shira-2")["frozen_unchanged"] is True


def test_full_leaves_nothing_frozen(world_2: TinyRun) -> None:
    actual = summary(world_2, "full-2")
    assert actual["trained_parameters"] == actual["total_parameters"]
