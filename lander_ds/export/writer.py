"""Writing HF model directories tensor by tensor: shards with their index, and the small files beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from lander_ds.common import console
from lander_ds.common.errors import ArtefactError
from lander_ds.common.files import write_json
from lander_ds.export.stream import Header, Spec, TensorOf
from lander_ds.models.files import INDEX, SINGLE

GIGABYTE = 10**9
DEFAULT_SHARD_BYTES = 5 * GIGABYTE


@dataclass(frozen=True)
class Form:
    """How weights are written."""

    dtype: torch.dtype | None = None
    """None keeps the base's types."""
    shard_bytes: int | None = None
    """Largest weight file. None: the base's own files where the tensors are the same, else `DEFAULT_SHARD_BYTES`."""


def shards(specs: Mapping[str, Spec], limit: int) -> dict[str, list[str]]:
    """File -> tensors, in their order; a tensor larger than the limit has a file of its own.

    Args:
        specs: tensors.
        limit: bytes per file.
    """
    parts: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if parts[-1] and size + spec.bytes > limit:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += spec.bytes
    if len(parts) == 1:
        return {SINGLE: parts[0]}
    count = len(parts)
    return {f"model-{number:05d}-of-{count:05d}.safetensors": part for number, part in enumerate(parts, 1)}


def write_weights(
    directory: Path, specs: Mapping[str, Spec], tensor_of: TensorOf, limit: int, title: str
) -> None:
    """Write tensors as `model.safetensors`, or as shards with an index.

    Args:
        directory: an existing directory.
        specs: all tensors.
        tensor_of: called once for each.
        limit: bytes per file.
        title: of the progress bar.
    """
    files = shards(specs, limit)
    headers = {file: Header.make({name: specs[name] for name in names}) for file, names in files.items()}
    write_files(directory, headers, tensor_of, title)
    if len(files) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        total = sum(spec.bytes for spec in specs.values())
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_files(directory: Path, headers: Mapping[str, Header], tensor_of: TensorOf, title: str) -> None:
    """Write weight files: name -> header."""
    with console.progress(f"{title} (tensors)", sum(len(header.specs) for header in headers.values())) as bar:

        def counted(name: str) -> torch.Tensor:
            bar.advance()
            return tensor_of(name)

        for file, header in headers.items():
            try:
                header.write(directory / file, counted)
            except OSError as error:
                size = sum(spec.bytes for spec in header.specs.values())
                raise ArtefactError(
                    f"{directory / file} ({size / 1e9:.1f} GB) cannot be written ({error}): free space, or write elsewhere; "
                    "what was there before is unchanged"
                ) from None
