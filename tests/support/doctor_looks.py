"""What `doctor.inspection.inspect` finds on a sound host, to spoil for a test."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

GIGABYTE = 10**9

SOUND: dict[str, Any] = {
    "machine": {
        "hostname": "node1",
        "python": "3.11.7",
        "architecture": "x86_64",
        "cores": 8,
        "memory": 64 * GIGABYTE,
        "free_memory": 60 * GIGABYTE,
        "identity": "boot/1",
    },
    "limits": {"open_files": 65536, "locked_memory": -1, "infiniband": False},
    "accelerator": {
        "cards": [],
        "driver": False,
        "cuda": None,
        "nccl": None,
        "gloo": True,
        "vectors": "AVX512",
    },
    "network": {
        "resolved": "10.0.0.1",
        "interfaces": {"lo": "127.0.0.1", "eth0": "10.0.0.1"},
        "addresses": ["10.0.0.1"],
        "leading": "eth0",
        "settings": {},
    },
    "tools": {"compiler": "/usr/bin/c++", "ninja": "/usr/bin/ninja"},
    "temporary": {"/tmp": 50 * GIGABYTE, "/dev/shm": 30 * GIGABYTE},
    "packages": {"torch": "2.13.0", "transformers": "5.23.0", "rich": "13.0"},
    "recipe": {
        "warning": None,
        "facts": {
            "recipe": {"seed": "1"},
            "deepspeed": {"zero_optimization.stage": "3"},
            "base": {"model": "aa"},
            "run_dir": {"prepared data": "missing"},
            "code": {"run.py": "cc"},
        },
    },
    "disk": {"run_dir": "/shared/run", "free": 100 * GIGABYTE},
    "topology": {},
    "need": {
        "device": 2 * GIGABYTE,
        "host": 0,
        "checkpoint": 12 * GIGABYTE // 10,
        "checkpoints": 1,
        "exports": 4 * GIGABYTE,
        "estimated": False,
    },
}

CARD = {"name": "H100", "memory": 80 * GIGABYTE, "free": 79 * GIGABYTE}


def look(number: int = 1, cards: int = 0, **changes: dict[str, Any]) -> dict[str, Any]:
    """A sound host's look with keys of its parts changed."""
    actual = deepcopy(SOUND)
    actual["machine"] |= {"hostname": f"node{number}", "identity": f"boot/{number}"}
    if cards:
        actual["accelerator"] |= {
            "cards": [dict(CARD)] * cards,
            "driver": True,
            "cuda": "12.8",
            "nccl": "2.27",
        }
    for part, changed in changes.items():
        actual[part] = changed if "error" in changed else {**actual[part], **changed}
    return actual
