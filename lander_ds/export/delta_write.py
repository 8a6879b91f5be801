"""Export `delta`: everything that differs from the base, as bits, with what is needed to go both ways."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lander_ds.common import console
from lander_ds.common.files import file_hash, replacing, write_json
from lander_ds.common.run_directory import versions
from lander_ds.export.bits import INDEX_DTYPE, Slices, difference, exclusive_or, pattern, tensor_hash
from lander_ds.export.delta import BITS, FORMAT, GATE, INDEX, META, SELECTION, WEIGHTS, Change
from lander_ds.export.fold import GateMeans
from lander_ds.export.sources import TensorSource
from lander_ds.export.stream import Header, Spec
from lander_ds.export.trained import TrainedModel
from lander_ds.models.weights import BaseWeights, base_name

logger = logging.getLogger(__name__)


def export_delta(trained: TrainedModel, directory: Path, means: GateMeans, facts: Mapping[str, Any]) -> None:
    """Write the delta of a training; an older one is replaced by the whole new one.

    Args:
        trained: the trained model.
        directory: where to.
        means: mean gate values, for folding; empty where there are no gates.
        facts: what the model card says of the training.
    """
    routed = trained.method == "lander"
    routing = {
        "routing": asdict(trained.routing) if routed else None,
        "dtype": str(trained.model.dtype).removeprefix("torch."),
        "gate_means": means,
    }
    with replacing(directory) as new:
        if routed:
            assert trained.selection is not None
            trained.selection.save(new / SELECTION)
        description = {"method": trained.method, **routing, "facts": dict(facts)}
        write_delta(trained.source, trained.gates, new, description, trained.base_fingerprint)


def write_delta(
    source: TensorSource,
    gates: Mapping[str, torch.Tensor],
    directory: Path,
    description: Mapping[str, Any],
    base_fingerprint: str,
) -> None:
    """Write `delta.safetensors` and `delta.json` into an existing directory.

    Every tensor is looked at twice, once for what changed in it and once to write that, so that memory stays at one.
    """
    weights = source.weights
    names = [name for name in weights.names() if name in source.changed()]
    changes: dict[str, Change] = {}
    slices_of: dict[str, Slices] = {}
    specs = {GATE + name: Spec.like(gate) for name, gate in gates.items()}
    with console.progress("find what changed (tensors)", len(names)) as bar:
        for name in names:
            old, new = weights.read(name), source.tensor(name, None)
            slices = difference(old, new)
            bar.advance()
            if slices is None:
                continue
            slices_of[name] = slices
            count = old.numel() if slices.index is None else len(slices.index)
            changes[name] = Change(
                *(name, str(old.dtype).removeprefix("torch."), tuple(old.shape), slices.dim, count),
                *(tensor_hash(old), tensor_hash(new)),
            )
            shape = list(old.shape)
            if slices.index is not None and slices.dim is not None:
                shape[slices.dim] = count
                specs[INDEX + name] = Spec(INDEX_DTYPE, (count,))
            specs[BITS + name] = Spec(pattern(old).dtype, tuple(shape))

    def tensor_of(key: str) -> torch.Tensor:
        kind, _, name = key.partition("/")
        if f"{kind}/" == GATE:
            return gates[name]
        slices = slices_of[name]
        if f"{kind}/" == INDEX:
            assert slices.index is not None
            return slices.index
        return exclusive_or(weights.read(name), source.tensor(name, None), slices)

    Header.make(specs, {"format": "pt", "delta": FORMAT}).write(directory / WEIGHTS, tensor_of)
    meta = {
        "format": FORMAT,
        **description,
        "base": _base(weights, base_fingerprint),
        "changes": [asdict(change) for change in changes.values()],
        "files": {
            name: file_hash(directory / name) for name in (WEIGHTS, SELECTION) if (directory / name).exists()
        },
        "versions": versions(),
    }
    write_json(directory / META, meta)
    size, whole = (directory / WEIGHTS).stat().st_size, sum(path.stat().st_size for path in weights.files())
    logger.info(
        "delta: %d tensors changed, %.1f MB (the base has %.1f MB)", len(changes), size / 1e6, whole / 1e6
    )


def _base(weights: BaseWeights, fingerprint: str) -> dict[str, Any]:
    """What is needed to recognise the base, and to write it again byte for byte."""
    layout = weights.layout
    return {
        "name": base_name(weights.directory),
        "fingerprint": fingerprint,
        "config": (weights.directory / "config.json").read_text(encoding="utf-8"),
        "files": None if layout.pickled else {path.name: Header.read(path).text for path in layout.paths},
        "index": None if layout.index is None or layout.pickled else layout.index.read_text(encoding="utf-8"),
    }
