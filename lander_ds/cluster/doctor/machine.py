"""What a host says about its machine and its installation, on Python's standard library alone."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import tempfile
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from lander_ds.cluster.doctor.shared import free_bytes

Part = dict[str, Any]


def machine() -> Part:
    """Name, cores, memory (bytes), and what tells two machines apart."""
    memory = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return {
        "hostname": socket.gethostname(),
        "python": platform.python_version(),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": int(memory["MemTotal"].split()[0]) * 1024,
        "free_memory": int(memory["MemAvailable"].split()[0]) * 1024,
        # Containers on one machine differ in their network.
        "identity": f"{boot}/{os.stat('/proc/self/ns/net').st_ino}",
    }


def limits() -> Part:
    """Soft limits (-1: none), and whether there are InfiniBand cards, which need locked memory."""
    infiniband = Path("/sys/class/infiniband")
    return {
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "locked_memory": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "infiniband": infiniband.is_dir() and any(infiniband.iterdir()),
    }


def tools() -> Part:
    """Where programs are found, None where they are not."""
    return {"compiler": shutil.which("c++") or shutil.which("g++"), "ninja": shutil.which("ninja")}


def temporary() -> Part:
    """Free bytes where temporary files and shared memory lie."""
    directories = (Path(tempfile.gettempdir()), Path("/dev/shm"))
    return {str(directory): free_bytes(directory) for directory in directories}


def packages() -> Part:
    """Name -> version of everything that is installed; of two versions the one that Python finds first."""
    installed: dict[str, str] = {}
    for distribution in distributions():
        installed.setdefault(distribution.name, distribution.version)
    return installed
