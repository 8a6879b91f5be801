"""DeepSpeed's CPU Adam, which it compiles with a C++ compiler where it was never compiled before; that takes minutes."""

from __future__ import annotations

import os
from functools import cache

from support.worlds import search_path, server

COMPILE_SECONDS = 900


@cache
def compile_cpu_adam() -> None:
    """Compile it before ranks do.

    Raises:
        RuntimeError: it failed, or took too long.
    """
    process = server().Process(target=_compile)
    process.start()
    process.join(COMPILE_SECONDS)
    process.kill()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"DeepSpeed's CPU Adam was not compiled: exit code {process.exitcode}")


def _compile() -> None:
    from deepspeed.ops.op_builder import CPUAdamBuilder

    os.environ["PATH"] = search_path()
    CPUAdamBuilder().load(verbose=False)
