"""Damaged and hostile deltas: refused with one line, and nothing is written anywhere."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import recipe_for, write_checkpoint
from support.exports import contents, open_trained
from support.tiny_models import save, tiny_model

from lander_ds.cli.main import main
from lander_ds.common.files import file_hash
from lander_ds.export.delta import META, SELECTION, WEIGHTS
from lander_ds.export.delta_write import export_delta

Spoil = Callable[[Path], None]
FACTS = {"base": {"name": "tiny", "fingerprint": "sha256:0"}, "method": "lander"}
UP = "model.layers.0.mlp.up_proj.weight"


def meta(change: Callable[[dict[str, Any]], object]) -> Spoil:
    def spoil(delta: Path) -> None:
        value = json.loads((delta / META).read_text())
        change(value)
        (delta / META).write_text(json.dumps(value))

    return spoil


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    """Change delta.safetensors, and its hash along with it."""

    def spoil(delta: Path) -> None:
        values = load_file(delta / WEIGHTS)
        change(values)
        save_file(values, delta / WEIGHTS)
        meta(lambda value: value["files"].update({WEIGHTS: file_hash(delta / WEIGHTS)}))(delta)

    return spoil


def flip_a_byte(name: str) -> Spoil:
    def spoil(delta: Path) -> None:
        content = bytearray((delta / name).read_bytes())
        content[-1] ^= 1
        (delta / name).write_bytes(content)

    return spoil


def text(name: str, content: str) -> Spoil:
    def spoil(delta: Path) -> None:
        (delta / name).write_text(content)

    return spoil


TABLE: dict[str, tuple[Spoil, str]] = {
    "no delta.json": (
        lambda delta: (delta / META).unlink(),
        r"delta\.json does not exist: give a directory that",
    ),
    "delta.json is not JSON": (text(META, "{"), r"delta\.json is not valid JSON"),
    "delta.json is a list": (text(META, "[]"), "is not a lander-delta-1 directory"),
    "another format": (
        meta(lambda m: m.update(format="lander-delta-9")),
        "is not a lander-delta-1 directory",
    ),
    "no changes": (meta(lambda m: m.pop("changes")), r"delta\.json is damaged"),
    "a change that is none": (meta(lambda m: m["changes"].append(5)), r"delta\.json is damaged"),
    "an unknown key": (meta(lambda m: m["changes"][0].update(code="x")), r"delta\.json is damaged"),
    "no base": (meta(lambda m: m.update(base=None)), r"delta\.json is damaged"),
    "config.json that is no text": (meta(lambda m: m["base"].update(config={})), r"delta\.json is damaged"),
    "an unknown option of the gates": (meta(lambda m: m["routing"].update(x=1)), r"delta\.json is damaged"),
    "another type": (meta(lambda m: m.update(dtype="load")), r"delta\.json is damaged"),
    "no facts": (meta(lambda m: m.update(facts={})), r"delta\.json is damaged"),
    "a missing file": (
        lambda delta: (delta / WEIGHTS).unlink(),
        r"delta\.safetensors is missing or not what was",
    ),
    "a flipped byte": (flip_a_byte(WEIGHTS), r"delta\.safetensors is missing or not what was written: copy"),
    "a flipped byte in the selection": (
        flip_a_byte(SELECTION),
        r"selection\.safetensors is missing or not what",
    ),
    "no selection": (
        meta(lambda m: m["files"].pop(SELECTION)),
        r"selection\.safetensors is missing or not what",
    ),
    "a file above": (meta(lambda m: m["files"].update({"../base/config.json": "x"})), "is no path inside"),
    "a file anywhere": (meta(lambda m: m["files"].update({"/etc/passwd": "x"})), "is no path inside"),
    "bits are missing": (weights(lambda w: w.pop(f"bits/{UP}")), "the change of .* is damaged"),
    "bits of another shape": (
        weights(lambda w: w.update({f"bits/{UP}": torch.zeros(3, dtype=torch.int32)})),
        "is damaged",
    ),
    "rows that are not there": (weights(lambda w: w[f"index/{UP}"].fill_(10_000)), "is damaged"),
    "other bits": (weights(lambda w: w[f"bits/{UP}"].bitwise_not_()), "does not lead where it should"),
    "a missing gate": (
        weights(lambda w: w.pop("gate/model.layers.0.mlp.router.w1")),
        "other gates than its selection",
    ),
    "another tensor": (meta(lambda m: m["changes"][0].update(tensor="model.x")), "lacks the tensor model.x"),
}


@pytest.fixture
def built(tmp_path: Path) -> Path:
    base = save(tiny_model("llama"), tmp_path / "base")
    recipe = recipe_for(base, tmp_path / "run")
    write_checkpoint(recipe)
    export_delta(open_trained(recipe), tmp_path / "delta", {}, FACTS)
    return tmp_path


@pytest.mark.parametrize("name", TABLE)
def test_a_bad_delta(name: str, built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, message = TABLE[name]
    spoil(built / "delta")
    before = contents(built)
    capsys.readouterr()
    assert main(["delta", "apply", str(built / "base"), str(built / "delta"), str(built / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")

    assert re.search(message, error), error
    assert contents(built) == before


@pytest.mark.parametrize(
    "name", ["../escaped.safetensors", "/tmp/escaped.safetensors", "a/b.safetensors", "run.py", ".."]
)
def test_reverting_writes_no_file_elsewhere(
    name: str, built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["delta", "apply", str(built / "base"), str(built / "delta"), str(built / "out")]) == 0

    def rename(value: dict[str, Any]) -> None:
        files = value["base"]["files"]
        files[name] = files.pop("model.safetensors")

    meta(rename)(built / "delta")
    before = contents(built)
    assert main(["delta", "revert", str(built / "out"), str(built / "delta"), str(built / "back")]) == 2
    assert "do not use this delta" in capsys.readouterr().err
    assert contents(built) == before


def test_a_hostile_header_is_refused(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["delta", "apply", str(built / "base"), str(built / "delta"), str(built / "out")]) == 0
    meta(lambda m: m["base"]["files"].update({"model.safetensors": '{"x": {"dtype": "F32"}}'}))(
        built / "delta"
    )
    assert main(["delta", "revert", str(built / "out"), str(built / "delta"), str(built / "back")]) == 2
    assert "not a safetensors header" in capsys.readouterr().err
    assert not (built / "back").exists()
