"""Where weights may lie: safetensors and (only when asked for) pickles, links of a cache, hostile indexes."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.exports import tensors
from support.tiny_models import examples, save, tiny_model
from transformers import AutoModelForCausalLM

from lander_ds.common.errors import ModelError
from lander_ds.config.recipe import ModelConfig
from lander_ds.models.files import INDEX, PICKLED_INDEX, PICKLED_SINGLE, SINGLE, weight_files
from lander_ds.models.loading import build, fill
from lander_ds.models.weights import BaseWeights, base_fingerprint, base_name


def pickled(directory: Path, parts: int = 1) -> Path:
    """A tiny model whose weights are pickles."""
    save(tiny_model("llama"), directory)
    values = load_file(directory / SINGLE)
    (directory / SINGLE).unlink()
    if parts == 1:
        torch.save(values, directory / PICKLED_SINGLE)
        return directory
    weight_map = {}
    for number in range(parts):
        name = f"pytorch_model-{number + 1:05d}-of-{parts:05d}.bin"
        part = {key: values[key] for key in list(values)[number::parts]}
        torch.save(part, directory / name)
        weight_map.update(dict.fromkeys(part, name))
    (directory / PICKLED_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


@pytest.mark.parametrize("parts", [1, 3])
def test_pickles_are_read_only_when_the_user_says_so(tmp_path: Path, parts: int) -> None:
    base = pickled(tmp_path / "base", parts)
    with pytest.raises(ModelError, match=r"only pickled weights \(pytorch_model.*model\.allow_pickle: true"):
        BaseWeights(base)
    model, family = build(ModelConfig(str(base), dtype="float32"), attention=None)
    fill(model, family, BaseWeights(base, allow_pickle=True), lambda unit: None)
    expected = tiny_model("llama")
    with torch.no_grad():
        for ids in examples():
            torch.testing.assert_close(model.eval()(ids[None]).logits, expected(ids[None]).logits)


def test_the_fingerprint_opens_no_pickle(tmp_path: Path) -> None:
    base = pickled(tmp_path / "base")
    first = base_fingerprint(base)
    content = bytearray((base / PICKLED_SINGLE).read_bytes())
    content[2000] ^= 1
    (base / PICKLED_SINGLE).write_bytes(content)
    assert base_fingerprint(base) != first


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    base = save(tiny_model("llama"), tmp_path / "base")
    (base / PICKLED_SINGLE).write_bytes(b"not even a pickle")
    assert weight_files(base).paths == (base / SINGLE,)
    BaseWeights(base)


class Bomb:
    """Runs a command when a careless program unpickles it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("kind", ["bomb", "bare bomb", "list", "nested", "old", "text"])
def test_pickles_of_other_things_are_refused_and_do_nothing(tmp_path: Path, kind: str) -> None:
    base, mark = pickled(tmp_path / "base"), tmp_path / "ran"
    path = base / PICKLED_SINGLE
    values = torch.load(path, weights_only=True)
    match kind:
        case "bomb":
            torch.save({**values, "x": Bomb(mark)}, path)
        case "bare bomb":
            path.write_bytes(pickle.dumps(Bomb(mark)))
        case "list":
            torch.save(list(values.values()), path)
        case "nested":
            torch.save({"state_dict": values}, path)
        case "old":
            torch.save(values, path, _use_new_zipfile_serialization=False)
        case _:
            path.write_text("no weights")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin .*safetensors checkpoint") as caught:
        BaseWeights(base, allow_pickle=True)
    assert "\n" not in str(caught.value)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["/etc/passwd", "../other.safetensors", "a/b.safetensors", "..", ""])
@pytest.mark.parametrize("index", [INDEX, PICKLED_INDEX])
def test_an_index_must_not_lead_out_of_the_directory(tmp_path: Path, index: str, name: str) -> None:
    base = save(tiny_model("llama"), tmp_path / "base")
    shutil.copy(base / SINGLE, tmp_path / "other.safetensors")
    (base / SINGLE).unlink()
    (base / index).write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(ModelError, match="names files outside"):
        BaseWeights(base, allow_pickle=True)


def test_an_empty_index_is_refused(tmp_path: Path) -> None:
    base = save(tiny_model("llama"), tmp_path / "base")
    (base / SINGLE).unlink()
    (base / INDEX).write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(ModelError, match="names no file"):
        BaseWeights(base)


def test_a_hugging_face_cache_of_links_works(tmp_path: Path) -> None:
    """models--org--name/snapshots/HASH/FILE -> ../../blobs/DIGEST, for every file."""
    plain = save(tiny_model("gemma3"), tmp_path / "plain", max_shard_size="12KB")
    blobs = tmp_path / "hub" / "models--org--tiny-gemma" / "blobs"
    snapshot = blobs.parent / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(plain.iterdir())):
        shutil.copy(path, blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number:064x}")
    assert base_fingerprint(snapshot) == base_fingerprint(plain)
    assert base_name(snapshot) == "org/tiny-gemma"
    model, family = build(ModelConfig(str(snapshot), dtype="float32"), attention=None)
    fill(model, family, BaseWeights(snapshot), lambda unit: None)
    expected = AutoModelForCausalLM.from_pretrained(plain).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_what_is_read_lies_in_the_file_and_not_in_memory(tmp_path: Path) -> None:
    """Reading twice gives the same memory, so a model of any size can be looked through."""
    base = save(tiny_model("llama"), tmp_path / "base")
    weights = BaseWeights(base)
    name = next(weights.names())
    assert weights.read(name).data_ptr() == weights.read(name).data_ptr()
    assert torch.equal(weights.read(name), tensors(base)[name])
