"""Which files of a Hugging Face model directory hold its weights. File names in an index are input: they never lead
out of the directory. (Links do: a Hugging Face cache is made of them.)
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from lander_ds.common.errors import ModelError
from lander_ds.common.files import is_inside

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED_INDEX = "pytorch_model.bin.index.json"
PICKLED_SINGLE = "pytorch_model.bin"
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a model directory."""

    paths: tuple[Path, ...]
    """At least one, in the order of their names."""
    index: Path | None
    """The index that names them; None for a single file."""
    pickled: bool
    """They are PyTorch pickles instead of safetensors."""


def weight_files(directory: Path) -> WeightFiles:
    """The weight files of a directory: safetensors where there are any, else pickles; a single file before shards,
    as in transformers.

    Raises:
        ModelError: the directory, every weight file or a shard is missing, the index is damaged or names files
            elsewhere, or there is an adapter.
    """
    if not directory.is_dir():
        raise ModelError(no_directory(directory))
    if (fault := adapter_fault(directory)) is not None:
        raise ModelError(f"{directory} {fault}")
    for single, index, pickled in ((SINGLE, INDEX, False), (PICKLED_SINGLE, PICKLED_INDEX, True)):
        if (directory / single).is_file():
            return WeightFiles((directory / single,), None, pickled)
        if (directory / index).is_file():
            names = _shards(directory / index)
            missing = [name for name in names if not (directory / name).is_file()]
            if missing:
                raise ModelError(
                    f"{directory}: shards named in {index} are missing: {', '.join(missing)}; "
                    "copy the model directory again"
                )
            return WeightFiles(tuple(directory / name for name in names), directory / index, pickled)
    raise ModelError(f"{directory} holds no {SINGLE} and no {INDEX}: is model.path an HF model directory?")


def adapter_fault(directory: Path) -> str | None:
    """What to say when a PEFT adapter lies in a model directory: transformers would load it with the weights."""
    name = next((name for name in ADAPTERS if (directory / name).exists()), None)
    if name is None:
        return None
    return (
        f"holds an adapter ({name}), which is no part of the weights here: merge it first, with PEFT's "
        "PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(...), or move it elsewhere if the "
        "base is to be used without it"
    )


def _shards(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if not is_inside(name) or Path(name).name != name]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index} is damaged ({error!r}): copy the model directory again") from None
    if outside:
        raise ModelError(
            f"{index} names files outside {index.parent} ({outside[0]}): do not use this directory"
        )
    if not names:
        raise ModelError(f"{index} is damaged (it names no file): copy the model directory again")
    return names


def no_directory(directory: Path) -> str:
    """What to say when there is no such model directory."""
    return f"model directory {directory} does not exist: set model.path to a local HF model directory"
