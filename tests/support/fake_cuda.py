"""A CUDA device without kernels, on which the product's own code runs without a card: nothing is computed, all is counted.

Tensors are fake (shape, type and device `cuda:0`, no values), so that wrong devices, and values that the host would have
to wait for, are errors or counts. Loading it changes the process for good: `counted` runs cases in a process of their own.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SOURCE = Path(__file__).with_suffix(".cpp")
PACKAGE = Path(__file__).parents[2] / "lander_ds"
TIMEOUT_SECONDS = 580
CUDA = torch.device("cuda", 0)

_WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "bincount")
"""Operations whose result, or its size, the host waits for."""
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
_NO_KERNEL = (
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "lift_fresh",
    "detach",
)


class Counts(TorchDispatchMode):
    """Counts what is asked of the fake device while it is the innermost mode."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        """Operation -> how often it was launched."""
        self.synchronisations: Counter[str] = Counter()
        """Line of the package, operation -> how often the host would wait for the device."""
        self.copies: Counter[str] = Counter()
        """The same of copies between host and device that wait for nobody."""

    @property
    def products(self) -> int:
        """Matrix products."""
        return sum(self.kernels[name] for name in _PRODUCTS)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count, then do as without this mode."""
        kwargs = kwargs or {}
        if function.namespace != "prim":
            self._count(function, args, kwargs)
        return function(*args, **kwargs)

    def _count(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        name = function.overloadpacket.__name__
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        to = kwargs.get("device")
        wanted = devices if to is None else devices | {torch.device(to).type}
        if "cuda" not in wanted:
            return
        if name in ("_to_copy", "copy_") and "cpu" in wanted:
            waits = not (kwargs.get("non_blocking") or (name == "copy_" and args[2:3] == (True,)))
            self._note(self.synchronisations if waits else self.copies, name)
        elif name in _WAITING or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            self._note(self.synchronisations, name)
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype == torch.bool or index.device.type == "cpu" for index in indices):
                self._note(self.synchronisations, name)
        if not function.is_view and name not in _NO_KERNEL:
            self.kernels[name] += 1

    @staticmethod
    def _note(counter: Counter[str], name: str) -> None:
        own = [frame for frame in traceback.extract_stack() if frame.filename.startswith(str(PACKAGE))]
        place = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "outside"
        counter[f"{place} {name}"] += 1


def compiled(cache: Path) -> Path:
    """The shared library; compiled once per version of source and PyTorch.

    Args:
        cache: directory that outlives the session.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the fake CUDA device needs a C++ compiler (g++)")
    digest = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = cache / f"fake_cuda-{digest}.so"
    if not library.exists():
        root = Path(torch.__file__).parent
        headers = [f"-I{root / 'include' / part}" for part in ("", "torch/csrc/api/include")]
        output = library.with_suffix(f".{os.getpid()}")
        command = [compiler, "-shared", "-fPIC", "-O0", "-std=c++20", *headers, str(SOURCE)]
        command += [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", "-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        output.rename(library)
    return library


def counted(library: Path, output: Path) -> dict[str, Any]:
    """What `fake_cuda_cases.py` has counted: case -> figures, or `error`."""
    if torch.version.cuda is not None:
        pytest.skip(
            "a PyTorch with CUDA has no room for a fake device: the tests marked `gpu` run on a real one"
        )
    module = [sys.executable, "-m", "support.fake_cuda_cases", str(library), str(output)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        module, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    cases: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return cases


def load(library: Path) -> None:
    """Give this process the fake device, which it then keeps."""
    ctypes.CDLL(str(library))


def fake_tensors() -> FakeTensorMode:
    """Context in which tensors have no values; those made before may be used."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def to_fake_cuda(model: nn.Module) -> None:
    """Put fake tensors on `cuda` in the place of a model's parameters and buffers, within `fake_tensors`."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in moved:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=CUDA)
                    moved[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = moved[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=CUDA)
