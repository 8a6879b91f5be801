"""The selection file: round trip and every kind of damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.fabricate import PAIRS, random_awareness

from lander_ds.common.errors import ArtefactError
from lander_ds.config.schema.method import BankChoice, LayerChoice, SelectConfig
from lander_ds.method.select import build_selection
from lander_ds.method.selection import Bank, Selection

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def selection() -> Selection:
    config = SelectConfig(
        LayerChoice(criterion="list", layers=(1, 4)),
        BankChoice(criterion="ratio", rho=0.4, min_awareness=0.1),
    )
    return build_selection(random_awareness(), config, seed=1)


@pytest.fixture
def path(selection: Selection, tmp_path: Path) -> Path:
    selection.save(tmp_path / "run" / "selection.safetensors")
    return tmp_path / "run" / "selection.safetensors"


def test_round_trip(selection: Selection, path: Path) -> None:
    loaded = Selection.load(path)
    assert (loaded.pairs, loaded.neurons, loaded.metadata) == (PAIRS, 40, selection.metadata)
    for got, expected in zip(loaded.layers, selection.layers, strict=True):
        assert (got.layer, got.banks) == (expected.layer, expected.banks)
        assert torch.equal(got.permutation, expected.permutation)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_tensors(selection: Selection, path: Path) -> None:
    tensors = load_file(path)
    assert set(tensors) == {f"layers.{i}.{name}" for i in (1, 4) for name in ("permutation", "bank_of")}
    layer = selection.layer(4)
    for number, neurons in enumerate(layer.slices()):
        assert (tensors["layers.4.bank_of"][neurons] == number).all()
    with pytest.raises(KeyError):
        selection.layer(0)


def test_equal_contents_give_equal_bytes(selection: Selection, path: Path, tmp_path: Path) -> None:
    for number in range(5):
        selection.save(tmp_path / f"{number}.safetensors")
        assert (tmp_path / f"{number}.safetensors").read_bytes() == path.read_bytes()


def test_group_names() -> None:
    assert Bank("specific", ("en-de", "en-fr"), 3).group == "specific:en-de+en-fr"
    assert Bank("general", ("en-de", "en-fr"), 3).group == "general:en-de+en-fr"
    assert Bank("frozen", (), 3).group == "frozen"


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="does not exist: run stage select"):
        Selection.load(tmp_path / "selection.safetensors")


@pytest.mark.parametrize("length", [0, 5, 100, -8])
def test_truncated(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ArtefactError, match=r"damaged.*run stage select"):
        Selection.load(path)


def test_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="damaged"):
        Selection.load(tmp_path)


@pytest.mark.parametrize("metadata", [None, {"selection": '{"format": "lander-selection-0"}'}])
def test_other_format(path: Path, metadata: dict[str, str] | None) -> None:
    save_file(load_file(path), path, metadata=metadata)
    with pytest.raises(ArtefactError, match="not a lander-selection-1 file"):
        Selection.load(path)


Description = dict[str, Any]


def rename_pair(description: Description, _: Tensors) -> None:
    description["pairs"][0] = "en-zh"


def resize_bank(description: Description, _: Tensors) -> None:
    description["layers"][0]["banks"][0]["size"] += 1


def empty_bank(description: Description, _: Tensors) -> None:
    description["layers"][1]["banks"].append({"kind": "specific", "owners": ["en-de"], "size": 0})


def move_neuron_between_banks(description: Description, _: Tensors) -> None:
    description["layers"][0]["banks"][0]["size"] -= 1
    description["layers"][0]["banks"][1]["size"] += 1


def repeat_neuron(_: Description, tensors: Tensors) -> None:
    tensors["layers.4.permutation"][0] = tensors["layers.4.permutation"][1]


def unknown_kind(description: Description, _: Tensors) -> None:
    description["layers"][0]["banks"][0]["kind"] = "shared"


def frozen_with_owner(description: Description, _: Tensors) -> None:
    description["layers"][0]["banks"][-1]["owners"] = ["en-de"]


def swap_layers(description: Description, _: Tensors) -> None:
    description["layers"].reverse()


def other_width(description: Description, _: Tensors) -> None:
    description["neurons"] = 41


def drop(key: str) -> Callable[[Description, Tensors], None]:
    return lambda description, _: description.pop(key)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (rename_pair, "layer 1: a bank is owned by en-de"),
        (resize_bank, "layer 1: the bank sizes do not sum to 40"),
        (empty_bank, "layer 4: the bank sizes"),
        (move_neuron_between_banks, "layer 1: bank_of contradicts"),
        (repeat_neuron, "layer 4: the permutation does not hold each of 40"),
        (other_width, "layer 1: the permutation does not hold each of 41"),
        (unknown_kind, "layer 1: shared bank"),
        (frozen_with_owner, "layer 1: frozen bank with 1 owners"),
        (swap_layers, "not in ascending order"),
        (drop("pairs"), "pairs"),
        (drop("metadata"), "metadata"),
        (drop("layers"), "layers"),
        (lambda _, tensors: tensors.pop("layers.1.permutation"), "layers.1.permutation"),
        (lambda _, tensors: tensors.pop("layers.4.bank_of"), "layers.4.bank_of"),
    ],
)
def test_contradictions(path: Path, damage: Callable[[Description, Tensors], object], message: str) -> None:
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["selection"])
    tensors = load_file(path)
    damage(description, tensors)
    save_file(tensors, path, metadata={"selection": json.dumps(description)})
    with pytest.raises(ArtefactError, match=f"damaged.*{message}.*run stage select"):
        Selection.load(path)
