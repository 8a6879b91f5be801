"""HF checkpoints on disk: checking them, naming their tensors, reading one tensor at a time.

A reader maps the files into memory, so a model can be filled layer by layer on ranks that never hold it whole.
Safetensors are read, and pickles only where the user says so.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lander_ds.common.errors import ModelError
from lander_ds.common.hash_cache import content_hash
from lander_ds.models.files import no_directory, weight_files

CONTENT, SAMPLED = "sha256:content:", "sha256:"
"""How fingerprints begin: of all bytes, and of a sample of them, as version 0.1.0 recorded it."""
_HASHED_AT_ONCE = 8
LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Piece:
    """A tensor on disk that is a part of one of the model's."""

    name: str
    """On disk."""
    dim: int
    begin: int
    end: int
    """Where it is: from `begin` to `end` (not included) along `dim`."""

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """The piece of the model's tensor."""
        return whole.narrow(self.dim, self.begin, self.end - self.begin)


_EXPERT = re.compile(
    r"(?P<front>.*)\b(?:mlp|block_sparse_moe)\.experts\.(?P<expert>\d+)\.(?P<projection>w[123]|(?:gate|up|down)_proj)\.weight"
)
_MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def experts_among(names: Iterable[str]) -> dict[str, list[str]]:
    """The projections of whole mixtures of experts, see `models.experts`, that lie on disk expert by expert.

    Args:
        names: the names on disk.

    Returns: name in the model -> names on disk, by expert.
    """
    experts: dict[str, dict[int, str]] = {}
    for name in names:
        if match := _EXPERT.fullmatch(name):
            projection = _MIXTRAL.get(match["projection"], match["projection"])
            whole = f"{match['front']}mlp.experts.{projection}.weight"
            experts.setdefault(whole, {})[int(match["expert"])] = name
    return {whole: [of[expert] for expert in sorted(of)] for whole, of in experts.items()}


def pieces(names: Sequence[str], dim: int, size: int) -> list[Piece]:
    """Tensors on disk, in order, as pieces of `size` each."""
    return [Piece(name, dim, number * size, (number + 1) * size) for number, name in enumerate(names)]


def experts_dimension(projection: str) -> int:
    """Along which experts lie side by side in a projection of all."""
    return int(projection.endswith("down_proj.weight"))


class BaseWeights:
    """The tensors of an HF model directory. Projections of mixtures of experts are found under the model's names too,
    though on disk they lie in pieces.

    Raises:
        ModelError: the directory is missing or incomplete, a file is missing or truncated, the index is damaged or
            names files elsewhere, or the weights are pickled and `allow_pickle` is not set.
    """

    def __init__(self, directory: str | Path, allow_pickle: bool = False) -> None:
        self.directory = Path(directory)
        self.layout = weight_files(self.directory)
        self._file_of: dict[str, Path] = {}
        self._open: dict[Path, _File] = {}
        if self.layout.pickled and not allow_pickle:
            raise ModelError(
                f"{self.directory} holds only pickled weights ({self.layout.paths[0].name}), which can run code on "
                "opening: convert them once with AutoModelForCausalLM.from_pretrained(...).save_pretrained(...), or "
                "set model.allow_pickle: true if you trust where they come from"
            )
        for path in self.layout.paths:
            self._open[path] = file = _unpickle(path) if self.layout.pickled else _open_safetensors(path)
            self._file_of.update(dict.fromkeys(file.names, path))
        self._experts = experts_among(self._file_of)
        self._known = self._file_of.keys() | self._experts.keys()

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def pieces(self, name: str) -> list[Piece]:
        """What a projection of all experts consists of on disk, in order; none for what is whole there."""
        names, dim = self._experts.get(name, []), experts_dimension(name)
        return pieces(names, dim, self.read(names[0]).shape[dim] if names else 0)

    def names_of(self, name: str) -> list[str]:
        """The tensors on disk that one of the model's consists of: those of its experts in order, else itself."""
        return self._experts.get(name, [name])

    def names(self) -> Iterator[str]:
        """Names of all tensors on disk."""
        return iter(self._file_of)

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor, or its first piece."""
        return self._file_of[self.names_of(name)[0]]

    def files(self) -> list[Path]:
        """All weight files."""
        return list(self._open)

    def names_in(self, path: Path) -> list[str]:
        """Names of the tensors in a weight file."""
        return list(self._open[path].names)

    def metadata(self, path: Path) -> dict[str, str]:
        """Metadata of a weight file."""
        return dict(self._open[path].metadata)

    def read(self, name: str) -> torch.Tensor:
        """The tensor called `name` on disk. It lies in the mapped file and takes no memory of its own, unless it is in
        pieces; copy it before writing into it.

        Raises:
            ModelError: its pieces do not fit together.
        """
        if name in self._experts:
            experts = [self.read(one) for one in self.names_of(name)]
            if len({(expert.shape, expert.dtype) for expert in experts}) > 1:
                raise ModelError(
                    f"{self.directory}: the experts of {name} differ in shape or type: copy the model directory again"
                )
            return torch.cat(experts, experts_dimension(name))
        return self._open[self._file_of[name]].read(name)

    def stored_name(self, name: str, prefix: str, renamed: Sequence[tuple[str, str]] = ()) -> str | None:
        """Name on disk of the model tensor `name`, or None; see `stored_among`."""
        return stored_among(self._known, name, prefix, renamed)


def stored_among(
    stored: Container[str], name: str, prefix: str, renamed: Sequence[tuple[str, str]] = ()
) -> str | None:
    """Name on disk of the model tensor `name`, or None.

    Older checkpoints lack the base model's prefix (BLOOM: `h.0...` for `transformer.h.0...`) or carry
    another one (`language_model.` in checkpoints of multimodal models).

    Args:
        stored: the names on disk.
        name: name in the HF model.
        prefix: `base_model_prefix` of the model class.
        renamed: the family's (part of a name in the model, that part on disk).
    """
    bare = name.removeprefix(f"{prefix}.")
    candidates = [name, bare, f"language_model.{name}", f"model.language_model.{bare}"]
    candidates.append(f"model.language_model.{name}")
    candidates += [name.replace(new, old) for new, old in renamed if new in name]
    return next((candidate for candidate in candidates if candidate in stored), None)


@dataclass(frozen=True)
class _File:
    """An open weight file."""

    names: Sequence[str]
    metadata: Mapping[str, str]
    read: Callable[[str], torch.Tensor]


def _open_safetensors(path: Path) -> _File:
    try:
        file = safe_open(path, framework="pt")
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error}): check it and its permissions") from None
    except SafetensorError as error:
        raise ModelError(_damage(path, error)) from None
    return _File(file.keys(), file.metadata() or {}, file.get_tensor)  # type: ignore[no-untyped-call]


def _unpickle(path: Path) -> _File:
    """A pickle of tensors and nothing else, mapped into memory rather than read."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch answers bad files with exceptions of many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ModelError(
            f"{path} cannot be opened as a pickle of tensors alone ({reason}): convert it once with "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...), or use a safetensors checkpoint"
        ) from None
    if not isinstance(tensors, dict) or not all(
        isinstance(value, torch.Tensor) for value in tensors.values()
    ):
        raise ModelError(f"{path} holds other things than named tensors: use a safetensors checkpoint")
    return _File(list(tensors), {}, tensors.__getitem__)


def _damage(path: Path, error: SafetensorError) -> str:
    with path.open("rb") as stream:
        pointer = stream.read(len(LFS_POINTER)) == LFS_POINTER
    if pointer:
        return f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in the model directory"
    return f"{path} is damaged or truncated ({error}): copy the model directory again"


def base_fingerprint(directory: str | Path) -> str:
    """Content hash of all of a model directory's weights and of its configuration (without the version of the library
    that wrote it). Large files are read once for it, see `hash_cache`; pickles are not opened.

    Returns: `sha256:content:` and 64 hex digits.

    Raises:
        ModelError: as `BaseWeights`, and `read_config`.
    """
    paths, digest = _begin_fingerprint(Path(directory))
    with ThreadPoolExecutor(min(len(paths), _HASHED_AT_ONCE)) as threads:
        for path, content in zip(paths, threads.map(_content_hash, paths), strict=True):
            digest.update(f"{path.name}:{content}".encode())
    return f"{CONTENT}{digest.hexdigest()}"


def is_base(recorded: object, fingerprint: str, directory: str | Path) -> bool:
    """Whether an artefact's recorded fingerprint is that of a base, in whichever form it was recorded.

    Args:
        recorded: from the artefact.
        fingerprint: of the base.
        directory: where the base lies.
    """
    if recorded == fingerprint:
        return True
    sampled = isinstance(recorded, str) and recorded.startswith(SAMPLED) and not recorded.startswith(CONTENT)
    return sampled and recorded == _sampled_fingerprint(directory)


def _sampled_fingerprint(directory: str | Path) -> str:
    """The fingerprint of version 0.1.0, which sees only a part of the weights: per file the size, the header and 64
    blocks of 4 KiB spread over the data."""
    paths, digest = _begin_fingerprint(Path(directory))
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little") if path.suffix == ".safetensors" else 0
            digest.update(stream.read(header))
            step = max(1, (size - 8 - header) // 64)
            for offset in range(8 + header, size, step):
                stream.seek(offset)
                digest.update(stream.read(4096))
    return f"{SAMPLED}{digest.hexdigest()}"


def _begin_fingerprint(directory: Path) -> tuple[Sequence[Path], Any]:
    """Weight files, checked as far as they are no pickles, and a hash that has the configuration in it."""
    layout = weight_files(directory)
    if not layout.pickled:
        BaseWeights(directory)
    config = read_config(directory)
    config.pop("transformers_version", None)
    return layout.paths, hashlib.sha256(json.dumps(config, sort_keys=True).encode())


def _content_hash(path: Path) -> str:
    try:
        return content_hash(path)
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error}): check it and its permissions") from None


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a model directory.

    Raises:
        ModelError: it is missing or not JSON.
    """
    path = directory / "config.json"
    if not directory.is_dir():
        raise ModelError(no_directory(directory))
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


def base_name(directory: str | Path) -> str:
    """A model directory's name for people: `org/name` in a Hugging Face cache, else its last part."""
    path = Path(directory).absolute()
    if path.parent.name == "snapshots":
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return path.name
