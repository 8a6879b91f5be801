"""Streamed safetensors files are those of the safetensors library, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.exports import tensors
from support.tiny_models import save, tiny_model
from transformers import AutoModelForCausalLM

from lander_ds.common.errors import ArtefactError, ModelError
from lander_ds.export.stream import DTYPES, Header, Spec
from lander_ds.export.writer import shards, write_files, write_weights
from lander_ds.models.files import INDEX, SINGLE
from lander_ds.models.weights import BaseWeights


def every_type() -> dict[str, torch.Tensor]:
    """Tensors of all types, forms and awkward names, in no order."""
    built = {f"b.{name}": torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in DTYPES.items()}
    built |= {f"a.{name}": torch.ones(3, dtype=dtype) for name, dtype in DTYPES.items()}
    built["überschrift"] = torch.randn(4, 5).T
    built["empty"] = torch.empty(0, 3, dtype=torch.bfloat16)
    built["number"] = torch.tensor(3.5)
    built['quoted"name'] = torch.tensor([float("nan"), -0.0, float("inf")])
    return built


def specs_of(values: dict[str, torch.Tensor]) -> dict[str, Spec]:
    return {name: Spec.like(value) for name, value in values.items()}


def test_files_are_byte_identical_to_save_file(tmp_path: Path) -> None:
    values = every_type()
    contiguous = {name: value.contiguous() for name, value in values.items()}
    save_file(contiguous, tmp_path / "theirs", metadata={"format": "pt"})
    Header.make(specs_of(values), {"format": "pt"}).write(tmp_path / "ours", values.__getitem__)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_one_tensor_is_asked_for_after_the_other_and_once(tmp_path: Path) -> None:
    asked: list[str] = []

    def tensor_of(name: str) -> torch.Tensor:
        asked.append(name)
        return torch.full((2,), float(len(asked)))

    specs = {name: Spec(torch.float32, (2,)) for name in ("c", "a", "b")}
    write_weights(tmp_path, specs, tensor_of, 10**9, "test")
    assert asked == ["a", "b", "c"]
    assert load_file(tmp_path / SINGLE)["b"].tolist() == [2.0, 2.0]


def test_a_header_is_read_as_it_was_written(tmp_path: Path) -> None:
    values = {name: value.contiguous() for name, value in every_type().items()}
    save_file(values, tmp_path / "theirs", metadata={"format": "pt", "note": "x"})
    header = Header.read(tmp_path / "theirs")
    assert dict(header.specs) == specs_of(values)
    header.write(tmp_path / "ours", values.__getitem__)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 9]}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}',
        '{"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}',
        '{"a": {"dtype": "F32", "shape": "wide", "data_offsets": [0, 8]}}',
        '{"a": 5}',
    ],
)
def test_a_damaged_header_is_refused(text: str) -> None:
    with pytest.raises(ModelError, match="not a safetensors header"):
        Header.parse(text)


def test_a_tensor_that_is_not_what_was_announced_is_refused(tmp_path: Path) -> None:
    header = Header.make({"a": Spec(torch.float32, (2,))})
    with pytest.raises(ModelError, match=r"a is torch\.float32 \[3\] and was to be torch\.float32 \[2\]"):
        header.write(tmp_path / "x", lambda _: torch.zeros(3))


def test_a_type_that_safetensors_lacks_is_refused() -> None:
    with pytest.raises(ModelError, match=r"a is of type torch\.complex128.*convert the model"):
        Header.make({"a": Spec(torch.complex128, (2,))})


def test_shards_hold_at_most_the_limit_and_large_tensors_alone() -> None:
    sizes = {"a": 3, "b": 3, "c": 20, "d": 1, "e": 9}
    specs = {name: Spec(torch.uint8, (size,)) for name, size in sizes.items()}
    actual = shards(specs, 10)
    assert list(actual) == [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]
    assert list(actual.values()) == [["a", "b"], ["c"], ["d", "e"]]
    assert shards(specs, 100) == {SINGLE: list(sizes)}


def test_shards_and_index_load_with_transformers(tmp_path: Path) -> None:
    model = tiny_model("llama-tied")
    base = save(model, tmp_path / "base")
    values = tensors(base)
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text((base / "config.json").read_text())
    write_weights(out, specs_of(values), values.__getitem__, 9000, "test")
    index = json.loads((out / INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == sum(v.numel() * 4 for v in values.values())
    for path in out.glob("*.safetensors"):
        holding = Header.read(path).specs.values()
        assert len(holding) == 1 or sum(spec.bytes for spec in holding) <= 9000
    loaded = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in values.items())
    assert set(BaseWeights(out).names()) == set(values)


def test_a_full_disk_is_told_with_the_size(tmp_path: Path) -> None:
    header = Header.make({"a": Spec(torch.float32, (2,))})
    with pytest.raises(
        ArtefactError, match=r"x/model\.safetensors \(0\.0 GB\) cannot be written .*free space"
    ):
        write_files(tmp_path / "x", {SINGLE: header}, lambda _: torch.zeros(2), "test")
