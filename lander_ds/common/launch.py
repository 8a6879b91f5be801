"""What a launcher tells every process it starts, readable before the ranks know of one another.

DeepSpeed's launcher, torchrun and launchers/rank.sh set PyTorch's variables; mpirun sets only its own.
"""

from __future__ import annotations

import os

_RANK = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
_MPI_SIZE = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_WORLD_SIZE = ("WORLD_SIZE", *_MPI_SIZE)


def rank() -> int:
    """This process's global rank; 0 without a launcher."""
    return _first(_RANK, 0)


def world_size() -> int:
    """Number of processes that the launcher started; 1 without a launcher."""
    return _first(_WORLD_SIZE, 1)


def local_rank() -> int:
    """This process's number on its host; 0 without a launcher."""
    return _first(("LOCAL_RANK",), 0)


def mpi_size() -> int | None:
    """How many processes mpirun started; None under anything else."""
    return _first(_MPI_SIZE, 0) or None


def _first(names: tuple[str, ...], default: int) -> int:
    """The first variable that is set to something."""
    return int(next((os.environ[name] for name in names if os.environ.get(name)), default))
