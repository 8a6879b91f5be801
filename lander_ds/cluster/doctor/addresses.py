"""What a host says about its network: names, interfaces, addresses."""

from __future__ import annotations

import os
import socket
import subprocess
from typing import Any

from lander_ds.common.errors import ConfigError
from lander_ds.distributed.discovery import address_towards, interfaces

SETTINGS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "CUDA_VISIBLE_DEVICES", "TZ")


def network(address: str | None) -> dict[str, Any]:
    """What the own name resolves to, interfaces with their addresses, and the one that leads to the other ranks.

    Args:
        address: where the ranks meet; None: by what `hostname -I` says.
    """
    try:
        resolved: str | None = socket.gethostbyname(socket.gethostname())
    except OSError:
        resolved = None
    by_name: dict[str, str | None] = dict.fromkeys(name for _, name in socket.if_nameindex())
    for interface in interfaces():
        by_name[interface.name] = by_name[interface.name] or interface.address
    own = _own_addresses()
    towards = _own_address_towards(address) if address else next(iter(own or []), None)
    return {
        "resolved": resolved,
        "interfaces": by_name,
        "addresses": own,
        "leading": next((one.name for one in interfaces() if one.address == towards), None),
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
    }


def _own_addresses() -> list[str] | None:
    """What `hostname -I` prints, of which DeepSpeed takes the first; None where there is no such command."""
    try:
        done = subprocess.run(["hostname", "-I"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split() if done.returncode == 0 else None


def _own_address_towards(address: str) -> str | None:
    try:
        return address_towards(address)
    except ConfigError:
        return None
