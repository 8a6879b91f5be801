"""Bad model directories and the message each gets. Nothing but ModelError may come out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import save, tiny_model

from lander_ds.common.errors import ModelError
from lander_ds.config.recipe import ModelConfig
from lander_ds.models.files import INDEX, SINGLE
from lander_ds.models.loading import build, fill
from lander_ds.models.weights import BaseWeights, base_fingerprint

Spoil = Callable[[Path], None]


def load(directory: Path) -> None:
    """Everything a stage does with a model directory."""
    base_fingerprint(directory)
    model, family = build(ModelConfig(path=str(directory), dtype="float32"))
    fill(model, family, BaseWeights(directory), lambda unit: None)


def remove_directory(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()


def replace_directory_by_file(directory: Path) -> None:
    remove_directory(directory)
    directory.write_text("not a directory")


def write(name: str, content: str | bytes) -> Spoil:
    def spoil(directory: Path) -> None:
        (directory / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def delete(name: str) -> Spoil:
    return lambda directory: (directory / name).unlink()


def config(**changes: Any) -> Spoil:
    """Change values of config.json; None removes one."""

    def spoil(directory: Path) -> None:
        path = directory / "config.json"
        values = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return spoil


def sharded(spoil: Spoil) -> Spoil:
    """Split the weights into shards before spoiling the directory."""

    def split_and_spoil(directory: Path) -> None:
        (directory / SINGLE).unlink()
        save(tiny_model("llama"), directory, max_shard_size="20KB")
        spoil(directory)

    return split_and_spoil


def index(content: Any) -> Spoil:
    """Write another index."""
    return sharded(write(INDEX, json.dumps(content)))


def delete_first_shard(directory: Path) -> None:
    min(directory.glob("model-*.safetensors")).unlink()


def tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Spoil:
    def spoil(directory: Path) -> None:
        values = load_file(directory / SINGLE)
        change(values)
        save_file(values, directory / SINGLE)

    return spoil


def truncate(directory: Path) -> None:
    path = directory / SINGLE
    path.write_bytes(path.read_bytes()[:-100])


def pickled(directory: Path) -> None:
    torch.save({}, directory / "pytorch_model.bin")
    (directory / SINGLE).unlink()


def one_nan(values: dict[str, torch.Tensor]) -> None:
    values["model.layers.1.mlp.up_proj.weight"][17, 5] = float("nan")


TABLE: dict[str, tuple[Spoil, str]] = {
    "no such directory": (remove_directory, r"model directory .*base does not exist: set model\.path"),
    "a file instead of a directory": (replace_directory_by_file, r"model directory .*base does not exist"),
    "no config.json": (
        delete("config.json"),
        r"config\.json does not exist: is model\.path an HF model directory",
    ),
    "config.json is not JSON": (write("config.json", "{model"), r"config\.json is not valid JSON .*copy"),
    "config.json is not text": (write("config.json", b"\xff\xfe\x00"), r"config\.json is not valid JSON"),
    "config.json is a list": (write("config.json", "[]"), r"config\.json has no model_type"),
    "no model_type": (config(model_type=None), r"config\.json has no model_type"),
    "unknown family": (
        config(model_type="mamba"),
        r"'mamba' is of no known family \(known: bloom, .*register",
    ),
    "an encoder": (config(model_type="bert"), r"'bert' is of no known family"),
    "quantised": (
        config(quantization_config={"quant_method": "gptq", "bits": 4}),
        r"config\.json says the weights are quantised.*use the unquantised checkpoint",
    ),
    "code in the directory": (
        config(auto_map={"AutoConfig": "evil.Config"}),
        r"wants to run Python code.*model\.trust_remote_code: true",
    ),
    "a size that is no number": (config(hidden_size="wide"), r"config\.json cannot be used by transformers"),
    "an unknown activation": (
        config(hidden_act="nonsense"),
        r"config\.json cannot be used by transformers.*nonsense",
    ),
    "head count zero": (config(num_attention_heads=0), r"config\.json cannot be used by transformers"),
    "no weights": (delete(SINGLE), rf"holds no {SINGLE} and no {INDEX}"),
    "only pickled weights": (pickled, r"only pickled weights \(pytorch_model\.bin\).*save_pretrained"),
    "truncated weights": (truncate, r"model\.safetensors is damaged or truncated .*copy"),
    "empty weights file": (write(SINGLE, ""), r"model\.safetensors is damaged or truncated"),
    "weights that are no safetensors": (write(SINGLE, b"\x80\x02}q\x00." * 50), r"damaged or truncated"),
    "a Git LFS pointer": (
        write(SINGLE, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        r"is a Git LFS pointer.*git lfs pull",
    ),
    "a missing shard": (
        sharded(delete_first_shard),
        r"shards named in .* are missing: model-00001-of-\d+\.safetensors",
    ),
    "index is not JSON": (sharded(write(INDEX, "{")), r"model\.safetensors\.index\.json is damaged"),
    "index is not text": (sharded(write(INDEX, b"\xff\xfe\x00")), r"index\.json is damaged"),
    "index is a list": (index([]), r"index\.json is damaged"),
    "index without weight_map": (index({"metadata": {}}), r"index\.json is damaged"),
    "index with numbers for files": (index({"weight_map": {"lm_head.weight": 5}}), r"index\.json is damaged"),
    "index with lists for files": (index({"weight_map": {"lm_head.weight": []}}), r"index\.json is damaged"),
    "index names the directory above": (
        index({"weight_map": {"a": ".."}}),
        r"names files outside .*\(\.\.\)",
    ),
    "index names a file elsewhere": (
        index({"weight_map": {"lm_head.weight": "../../secret.safetensors"}}),
        r"names files outside .*\(\.\./\.\./secret\.safetensors\): do not use this directory",
    ),
    "index names an absolute path": (
        index({"weight_map": {"lm_head.weight": "/etc/passwd"}}),
        r"names files outside .*\(/etc/passwd\)",
    ),
    "a missing tensor": (
        tensors(lambda values: values.pop("model.layers.2.mlp.down_proj.weight")),  # type: ignore[arg-type]
        r"lacks the tensor model\.layers\.2\.mlp\.down_proj\.weight that config\.json implies",
    ),
    "more layers in config.json than on disk": (
        config(num_hidden_layers=4),
        r"lacks the tensor model\.layers\.3\.",
    ),
    "another width in config.json": (
        config(intermediate_size=40),
        r"model\.safetensors: model\.layers\.0\.mlp\.\w+_proj\.weight has shape .*48.*config\.json .*40",
    ),
    "one NaN": (
        tensors(one_nan),
        r"model\.safetensors: model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity",
    ),
    "infinity": (
        tensors(lambda values: values["model.norm.weight"].fill_(float("inf"))),  # type: ignore[arg-type]
        r"model\.norm\.weight holds NaN or infinity",
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_message_of_a_bad_model_directory(name: str, tmp_path: Path) -> None:
    spoil, message = TABLE[name]
    directory = save(tiny_model("llama"), tmp_path / "base")
    spoil(directory)
    with pytest.raises(ModelError, match=message) as caught:
        load(directory)
    assert "\n" not in str(caught.value)
    assert str(directory) in str(caught.value)


def test_the_good_directory_that_the_table_spoils_loads(tmp_path: Path) -> None:
    load(save(tiny_model("llama"), tmp_path / "base"))
