"""What one host can say about itself: machine, limits, accelerator, network, tools, recipe, directories.

Every part is looked at by itself: where one fails, its value is `{"error": why}` and the rest still comes.
"""

from __future__ import annotations

import fcntl
import os
import platform
import resource
import shutil
import socket
import struct
import subprocess
import tempfile
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from lander_ds.cluster.doctor.shared import existing
from lander_ds.common.errors import LanderError

Part = dict[str, Any]

SIOCGIFADDR = 0x8915
"""Linux: the IPv4 address of an interface."""
SETTINGS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "CUDA_VISIBLE_DEVICES", "TZ")


def inspect(
    recipe: Path | None, overrides: list[str], world: int | None, address: str | None
) -> dict[str, Part]:
    """All parts.

    Args:
        recipe: the recipe's path here; None leaves out what depends on it.
        overrides: `--set` arguments.
        world: ranks on all hosts, to count what each will hold, which takes seconds; None: leave that out.
        address: where the ranks meet, to see which interface leads there; None: by what `hostname -I` says.
    """
    parts: dict[str, Callable[[], Part]] = {
        "machine": machine,
        "limits": limits,
        "accelerator": accelerator,
        "network": lambda: network(address),
        "tools": tools,
        "temporary": temporary,
        "packages": packages,
    }
    if recipe is not None:
        parts["recipe"] = lambda: recipe_facts(recipe, overrides)
        parts["places"] = lambda: places(recipe, overrides)
        parts["topology"] = topology
        if world is not None:
            parts["need"] = lambda: need(recipe, overrides, world)
    return {name: _guarded(look) for name, look in parts.items()}


def _guarded(look: Callable[[], Part]) -> Part:
    try:
        return look()
    except LanderError as error:
        return {"error": str(error)}
    except Exception as error:
        # Of any kind: broken installations are what this looks for.
        return {"error": f"{type(error).__name__}: {error}"}


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


def accelerator() -> Part:
    """GPUs with their memory (bytes), and the libraries that ranks communicate with."""
    import torch
    import torch.distributed as dist

    cards = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        cards.append({"name": torch.cuda.get_device_name(index), "memory": total, "free": free})
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if cards else None  # type: ignore[no-untyped-call]
    return {
        "cards": cards,
        "driver": Path("/proc/driver/nvidia").exists(),
        "cuda": torch.version.cuda,
        "nccl": nccl if dist.is_nccl_available() else None,
        "gloo": dist.is_gloo_available(),
    }


def network(address: str | None) -> Part:
    """What the own name resolves to, interfaces with their addresses, and the one that leads to the other ranks."""
    name = socket.gethostname()
    try:
        resolved: str | None = socket.gethostbyname(name)
    except OSError:
        resolved = None
    interfaces = _interfaces()
    own = _own_addresses()
    way = _own_address_towards(address) if address else next(iter(own or []), None)
    return {
        "resolved": resolved,
        "interfaces": interfaces,
        "addresses": own,
        "leading": next((name for name, found in interfaces.items() if found == way), None),
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
    }


def _interfaces() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                found[name] = socket.inet_ntoa(fcntl.ioctl(query, SIOCGIFADDR, request)[20:24])
            except OSError:
                found[name] = None
    return found


def _own_addresses() -> list[str] | None:
    """What `hostname -I` prints, of which DeepSpeed takes the first; None where there is no such command."""
    try:
        done = subprocess.run(["hostname", "-I"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split() if done.returncode == 0 else None


def _own_address_towards(address: str) -> str | None:
    """This host's address on the way there; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:
        try:
            query.connect((address, 9))
        except OSError:
            return None
        return str(query.getsockname()[0])


def tools() -> Part:
    """Where programs are found, None where they are not."""
    return {"compiler": shutil.which("c++") or shutil.which("g++"), "ninja": shutil.which("ninja")}


def packages() -> Part:
    """Name -> version of everything that is installed; of two versions the one that Python finds first."""
    installed: dict[str, str] = {}
    for found in distributions():
        installed.setdefault(found.name, found.version)
    return installed


def recipe_facts(path: Path, overrides: list[str]) -> Part:
    """Facts that ranks compare when they start; and whether the recipe passes its checks here.

    Returns: `facts` as of `preflight.facts.collect`; `warning`: what keeps other stages than train from running, or None.

    Raises:
        LanderError: training could not run here.
    """
    from lander_ds.config.deepspeed_json import check_deepspeed_json
    from lander_ds.config.loading import read_recipe
    from lander_ds.preflight import facts
    from lander_ds.preflight.recipe import check_recipe

    recipe, document = read_recipe(path, overrides)
    check_recipe(recipe, "train", document)
    check_deepspeed_json(recipe)
    warning = None
    try:
        check_recipe(recipe, "all", document)
    except LanderError as error:
        warning = str(error)
    return {"facts": facts.collect(recipe), "warning": warning}


def places(path: Path, overrides: list[str]) -> Part:
    """Free bytes where the run directory lies."""
    from lander_ds.config.loading import load_recipe

    run_dir = Path(load_recipe(path, overrides).run_dir)
    return {"run_dir": str(run_dir.resolve()), "free": _free(run_dir)}


def temporary() -> Part:
    """Free bytes where temporary files and shared memory lie."""
    return {str(place): _free(place) for place in (Path(tempfile.gettempdir()), Path("/dev/shm"))}


def _free(path: Path) -> int | None:
    try:
        return shutil.disk_usage(existing(path)).free
    except OSError:
        return None


def topology() -> Part:
    """Whether the installed DeepSpeed fits.

    Raises:
        ConfigError: it does not.
    """
    from lander_ds.distributed.engines.deepspeed_internals import check_deepspeed

    check_deepspeed()
    return {}


def need(path: Path, overrides: list[str], world: int) -> Part:
    """See `estimate.need_of`."""
    from lander_ds.cluster.doctor.estimate import need_of
    from lander_ds.config.loading import load_recipe

    return need_of(load_recipe(path, overrides), world).as_json()
