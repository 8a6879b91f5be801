"""DeepSpeed's CPU Adam, which it compiles with a C++ compiler where it was never compiled before; that takes minutes."""

from __future__ import annotations

import os
import time
from functools import cache
from pathlib import Path

from support.worlds import compilation, server

COMPILE_SECONDS = 900


@cache
def compile_cpu_adam() -> None:
    """Compile it before ranks do.

    Raises:
        RuntimeError: it failed, or took too long.
    """
    # A compilation that was killed leaves its lock, for which the next one would wait for ever.
    lock = Path(compilation()["TORCH_EXTENSIONS_DIR"]) / "cpu_adam" / "lock"
    if lock.exists() and time.time() - lock.stat().st_mtime > COMPILE_SECONDS:
        lock.unlink()
    process = server().Process(target=_compile)
    process.start()
    process.join(COMPILE_SECONDS)
    process.kill()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"DeepSpeed's CPU Adam was not compiled: exit code {process.exitcode}")


def _compile() -> None:
    from deepspeed.ops.op_builder import CPUAdamBuilder

    os.environ.update(compilation())
    CPUAdamBuilder().load(verbose=False)
