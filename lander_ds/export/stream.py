"""Safetensors files written one tensor at a time: the header is known first, then each tensor is made, written and
forgotten. Memory stays at one tensor, whatever the size of the file.

Format (R, huggingface/safetensors): 8 bytes with the length of the header, the header (JSON, padded with blanks to a
multiple of 8), the tensors without gaps. Files are byte for byte those of `safetensors.torch.save_file`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lander_ds.common.errors import ModelError

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
"""Safetensors' names of the types, in its order: a file holds the last of them first, which keeps tensors aligned."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANK = {name: rank for rank, name in enumerate(DTYPES)}

TensorOf = Callable[[str], torch.Tensor]
"""Name -> the tensor, made when it is asked for."""


@dataclass(frozen=True)
class Spec:
    """What a tensor will be."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return math.prod(self.shape) * self.dtype.itemsize

    @staticmethod
    def like(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> Spec:
        """That of a tensor, perhaps in another type."""
        return Spec(dtype or tensor.dtype, tuple(tensor.shape))


@dataclass(frozen=True)
class Header:
    """The beginning of a file, and what follows it."""

    text: str
    """JSON, without the padding."""
    specs: Mapping[str, Spec]
    """Name -> tensor, in the order of the file."""

    @staticmethod
    def make(specs: Mapping[str, Spec], metadata: Mapping[str, str] | None = None) -> Header:
        """The header that safetensors would write.

        Raises:
            ModelError: a tensor's type has no name in safetensors.
        """
        if unknown := [name for name, spec in specs.items() if spec.dtype not in _NAMES]:
            raise ModelError(
                f"{unknown[0]} is of type {specs[unknown[0]].dtype}, which safetensors cannot hold: convert the model"
            )
        names = sorted(specs, key=lambda name: (-_RANK[_NAMES[specs[name].dtype]], name.encode()))
        content: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
        start = 0
        for name in names:
            spec, stop = specs[name], start + specs[name].bytes
            content[name] = {
                "dtype": _NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [start, stop],
            }
            start = stop
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        return Header(text, {name: specs[name] for name in names})

    @staticmethod
    def parse(text: str) -> Header:
        """The header with this text, which may come from another program.

        Raises:
            ModelError: the text is no header without gaps.
        """
        specs: dict[str, Spec] = {}
        try:
            content = json.loads(text)
            content.pop("__metadata__", None)
            end = 0
            for name, entry in sorted(content.items(), key=lambda item: item[1]["data_offsets"]):
                specs[name] = Spec(DTYPES[entry["dtype"]], tuple(map(int, entry["shape"])))
                if entry["data_offsets"] != [end, end + specs[name].bytes]:
                    raise ValueError(f"{name} does not begin where the tensor before it ends")
                end += specs[name].bytes
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"not a safetensors header ({error!r}): copy the file again") from None
        return Header(text, specs)

    @staticmethod
    def read(path: Path) -> Header:
        """The header of a file."""
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            return Header.parse(stream.read(length).decode().rstrip(" "))

    def write(self, path: Path, tensor_of: TensorOf) -> None:
        """Write the file, tensor by tensor in the order of `specs`."""
        text = self.text.encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little"))
            stream.write(text)
            for name, spec in self.specs.items():
                tensor = tensor_of(name)
                if Spec.like(tensor) != spec:
                    raise ModelError(
                        f"{path}: {name} is {tensor.dtype} {list(tensor.shape)} and was to be {spec.dtype} "
                        f"{list(spec.shape)}: the base has changed meanwhile; start again"
                    )
                stream.write(raw(tensor))


def raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
