"""Export `dense`: the base's own architecture and files, with what has changed written in.

Tensors that training did not touch are byte-equal to the base's. Gates have no place in a standard architecture:
they are dropped, or folded into the weights as constants (`lander_ds.export.fold`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lander_ds.common.files import replacing, write_json
from lander_ds.export.companions import copy_companions
from lander_ds.export.sources import TensorSource, kind_of
from lander_ds.export.stream import Header, Spec
from lander_ds.export.writer import DEFAULT_SHARD_BYTES, Form, write_files, write_weights
from lander_ds.models.weights import read_config


def export_dense(source: TensorSource, directory: Path, form: Form) -> None:
    """Write a model directory; an older one is replaced by the whole new one."""
    base = source.weights.directory
    with replacing(directory) as new:
        write_base_layout(source, new, form, f"export {directory.name}")
        config = read_config(base)
        write_json(new / "config.json", _typed(config, form))
        copy_companions(base, new, code="auto_map" in config)


def write_base_layout(source: TensorSource, directory: Path, form: Form, title: str) -> None:
    """Write every tensor of the base into `directory`: in the base's own files, or in shards of the asked size."""
    weights = source.weights

    def spec(name: str) -> Spec:
        base = weights.read(name)
        return Spec.like(base, kind_of(base, form.dtype))

    if weights.layout.pickled or form.shard_bytes is not None:
        specs = {name: spec(name) for name in weights.names()}
        limit = form.shard_bytes or DEFAULT_SHARD_BYTES
        write_weights(directory, specs, lambda name: source.tensor(name, form.dtype), limit, title)
        return
    same = form.dtype is None
    headers = {
        # The base's own header, so that a file without a change stays the same byte for byte.
        path.name: Header.read(path)
        if same
        else Header.make({name: spec(name) for name in weights.names_in(path)}, weights.metadata(path))
        for path in weights.files()
    }
    write_files(directory, headers, lambda name: source.tensor(name, form.dtype), title)
    if weights.layout.index is not None:
        index = weights.layout.index
        content = json.loads(index.read_text(encoding="utf-8"))
        # Without metadata transformers cannot read an index.
        if same and "metadata" in content:
            shutil.copyfile(index, directory / index.name)
        else:
            total = sum(spec.bytes for header in headers.values() for spec in header.specs.values())
            write_json(directory / index.name, {**content, "metadata": {"total_size": total}})


def _typed(config: Mapping[str, Any], form: Form) -> dict[str, Any]:
    """config.json for weights of another type."""
    typed = dict(config)
    if form.dtype is not None:
        typed.pop("torch_dtype", None)
        typed["dtype"] = str(form.dtype).removeprefix("torch.")
        if isinstance(typed.get("text_config"), dict):
            typed["text_config"] = _typed(typed["text_config"], form)
    return typed
