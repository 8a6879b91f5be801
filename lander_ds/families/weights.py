"""HF checkpoints on disk: checking them, naming their tensors, reading one tensor at a time.

Only safetensors are read. A reader maps the files into memory and copies a tensor when it is asked for, so a
model can be filled layer by layer on ranks that never hold it whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lander_ds.errors import ModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LFS_POINTER = b"version https://git-lfs"


class BaseWeights:
    """The tensors of an HF model directory.

    Raises:
        ModelError: the directory is missing or incomplete, a shard is missing or truncated, the index is
            damaged or names files elsewhere, or only pickled weights are there.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._file_of: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        for path in self._files():
            try:
                file = safe_open(path, framework="pt")
            except OSError as error:
                raise ModelError(f"{path} cannot be read ({error}): check it and its permissions") from None
            except SafetensorError as error:
                raise ModelError(_damage(path, error)) from None
            names: list[str] = file.keys()  # type: ignore[no-untyped-call]
            self._open[path] = file
            self._file_of.update(dict.fromkeys(names, path))

    def _files(self) -> list[Path]:
        if not self.directory.is_dir():
            raise ModelError(_no_directory(self.directory))
        index, single = self.directory / INDEX, self.directory / SINGLE
        # transformers prefers the single file, too, where both are there.
        if single.is_file():
            return [single]
        if index.is_file():
            names = _shards(index)
            missing = [name for name in names if not (self.directory / name).is_file()]
            if missing:
                raise ModelError(
                    f"{self.directory}: shards named in {INDEX} are missing: {', '.join(missing)}; "
                    "copy the model directory again"
                )
            return [self.directory / name for name in names]
        pickled = sorted(path.name for path in self.directory.glob("*.bin"))
        if pickled:
            raise ModelError(
                f"{self.directory} holds only pickled weights ({pickled[0]}), which can run code on opening: "
                "convert them once with AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
            )
        raise ModelError(
            f"{self.directory} holds no {SINGLE} and no {INDEX}: is model.path an HF model directory?"
        )

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def names(self) -> Iterator[str]:
        """Names of all tensors on disk."""
        return iter(self._file_of)

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._file_of[name]

    def files(self) -> list[Path]:
        """All weight files."""
        return list(self._open)

    def read(self, name: str) -> torch.Tensor:
        """A copy of the tensor called `name` on disk."""
        return self._open[self._file_of[name]].get_tensor(name)  # type: ignore[no-any-return]

    def stored_name(self, name: str, prefix: str, renamed: Sequence[tuple[str, str]] = ()) -> str | None:
        """Name on disk of the model tensor `name`, or None.

        Older checkpoints lack the base model's prefix (BLOOM: `h.0...` for `transformer.h.0...`) or carry
        another one (`language_model.` in checkpoints of multimodal models).

        Args:
            name: name in the HF model.
            prefix: `base_model_prefix` of the model class.
            renamed: the family's (start of the name in the model, start on disk).
        """
        bare = name.removeprefix(f"{prefix}.")
        candidates = [name, bare, f"language_model.{name}", f"model.language_model.{bare}"]
        candidates.append(f"model.language_model.{name}")
        candidates += [old + name.removeprefix(new) for new, old in renamed if name.startswith(new)]
        return next((candidate for candidate in candidates if candidate in self._file_of), None)


def _shards(index: Path) -> list[str]:
    """File names in an index; they are input and must not lead out of the model directory."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name or name == ".."]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index} is damaged ({error!r}): copy the model directory again") from None
    if outside:
        raise ModelError(
            f"{index} names files outside {index.parent} ({outside[0]}): do not use this directory"
        )
    return names


def _no_directory(directory: Path) -> str:
    return f"model directory {directory} does not exist: set model.path to a local HF model directory"


def _damage(path: Path, error: SafetensorError) -> str:
    with path.open("rb") as stream:
        pointer = stream.read(len(LFS_POINTER)) == LFS_POINTER
    if pointer:
        return f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in the model directory"
    return f"{path} is damaged or truncated ({error}): copy the model directory again"


def base_fingerprint(directory: str | Path) -> str:
    """Content hash of a model directory's weights and configuration, cheap to compute.

    Per weight file it takes the size, the header (names, shapes, types, offsets) and 64 blocks of 4 KiB
    spread over the data; of config.json everything but the version of the library that wrote it.

    Returns: `sha256:` and 64 hex digits.
    """
    weights = BaseWeights(directory)
    digest = hashlib.sha256()
    config = read_config(Path(directory))
    config.pop("transformers_version", None)
    digest.update(json.dumps(config, sort_keys=True).encode())
    for path in sorted(weights.files()):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
            digest.update(stream.read(header))
            step = max(1, (size - 8 - header) // 64)
            for offset in range(8 + header, size, step):
                stream.seek(offset)
                digest.update(stream.read(4096))
    return f"sha256:{digest.hexdigest()}"


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a model directory.

    Raises:
        ModelError: it is missing or not JSON.
    """
    path = directory / "config.json"
    if not directory.is_dir():
        raise ModelError(_no_directory(directory))
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist: is model.path an HF model directory?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not valid JSON ({error}): copy the model directory again") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error}): check it and its permissions") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise ModelError(f"{path} has no model_type: is model.path an HF model directory?")
    return config
