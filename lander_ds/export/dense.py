"""Export `dense`: the base's own architecture and files, with the trained rows and columns written in.

Tensors that training did not touch are byte-equal to the base's. Gates have no place in a standard architecture and
are dropped, so the result is exact for `gate: none` and for the baselines, and an approximation otherwise.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lander_ds import console
from lander_ds.directories import replacing
from lander_ds.export.trained import TrainedModel
from lander_ds.export.writer import copy_companions
from lander_ds.families.weights import INDEX, read_config
from lander_ds.run import write_json

logger = logging.getLogger(__name__)


def export_dense(trained: TrainedModel, directory: Path, dtype: torch.dtype | None) -> None:
    """Write the directory, shard by shard as the base has them.

    Args:
        trained: base and trained tensors.
        directory: where to; replaced when it exists.
        dtype: of the exported weights; None keeps the base's types.
    """
    if any(".router." in name for name in trained.tensors):
        logger.warning("dense export drops the gates: it only approximates a model trained with routing.gate")
    base = trained.weights.directory
    changes = trained.changes()
    with (
        replacing(directory) as new,
        console.progress("export dense (tensors)", len(list(trained.weights.names()))) as bar,
    ):
        for path in trained.weights.files():
            tensors = {}
            with safe_open(path, framework="pt") as file:
                names, metadata = list(file.keys()), file.metadata()
            for stored in names:
                tensors[stored] = trained.merged(stored, changes.get(stored, []), dtype)
                bar.advance()
            save_file(tensors, new / path.name, metadata=metadata or {"format": "pt"})
        if (base / INDEX).exists():
            shutil.copyfile(base / INDEX, new / INDEX)
        config = read_config(base)
        if dtype is not None:
            config.pop("torch_dtype", None)
            config["dtype"] = str(dtype).removeprefix("torch.")
        write_json(new / "config.json", config)
        copy_companions(base, new)
