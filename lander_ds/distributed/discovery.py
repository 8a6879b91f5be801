"""Who this process is among the ranks, and through which network interface it reaches them.

DeepSpeed's launcher, torchrun and launchers/rank.sh (under SLURM) set PyTorch's variables. Under mpirun nothing does:
there mpi4py tells.
"""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass
from ipaddress import ip_address

import psutil

from lander_ds.common.errors import ConfigError

logger = logging.getLogger(__name__)

RENDEZVOUS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
"""What torch.distributed reads."""

DEFAULT_PORT = 29500

OUTSIDE = "192.0.2.1"
"""An address that belongs to no network (RFC 5737): only a default route leads there."""


VIRTUAL = ("docker", "veth", "br-", "virbr", "cni", "flannel", "cali", "podman", "tun", "tap")
"""Beginnings of the names of interfaces that do not lead to other hosts."""


@dataclass(frozen=True)
class Interface:
    """An address of this host."""

    name: str
    address: str
    netmask: str


def discover() -> None:
    """Under mpirun, set PyTorch's variables on every rank (collective); does nothing where they are set.

    MASTER_ADDR and MASTER_PORT that are set stay.

    Raises:
        ConfigError: some variables are set, others are not; or mpi4py belongs to another MPI than mpirun.
    """
    missing = RENDEZVOUS - os.environ.keys()
    if not missing:
        return
    started = os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ.get("PMI_SIZE")
    if "RANK" in os.environ or started is None:
        raise ConfigError(f"{', '.join(sorted(missing))} not set: start all ranks with one of the launchers")
    # Importing it initialises MPI.
    from mpi4py import MPI  # noqa: PLC0415

    world = MPI.COMM_WORLD
    if world.size != int(started):
        raise ConfigError(
            f"mpirun has started {started} ranks, but mpi4py knows of {world.size}: it has found another MPI than "
            "mpirun's; load one MPI, or set MPI4PY_LIBMPI to the path of its libmpi.so"
        )
    # Ranks of one host share memory; names of hosts need not differ.
    host = world.Split_type(MPI.COMM_TYPE_SHARED)
    own = os.environ.get("MASTER_ADDR") or (own_address() if world.rank == 0 else "")
    os.environ.update(
        RANK=str(world.rank),
        LOCAL_RANK=str(host.rank),
        WORLD_SIZE=str(world.size),
        LOCAL_WORLD_SIZE=str(host.size),
        MASTER_ADDR=world.bcast(own),
        MASTER_PORT=world.bcast(os.environ.get("MASTER_PORT", str(DEFAULT_PORT))),
    )
    host.Free()


def check_interfaces(*variables: str) -> None:
    """Refuse variables that name interfaces which this host does not have: the ranks would not reach each other.

    Args:
        variables: GLOO_SOCKET_IFNAME (names) or NCCL_SOCKET_IFNAME (beginnings of names; `=` names, `^` what not to
            take), separated by commas; those that are not set are sound.

    Raises:
        ConfigError: what a variable names is not there, is down or has no address.
    """
    present = {interface.name: interface.address for interface in reversed(interfaces(any_family=True))}
    for variable in variables:
        value = os.environ.get(variable, "")
        exact = value.startswith("=")
        wanted = [name.strip() for name in value.lstrip("=").split(",") if name.strip()]
        if not wanted or value.startswith("^"):
            continue
        if variable.startswith("GLOO"):
            sound = set(wanted) <= set(present)
        else:
            sound = any(name in wanted if exact else name.startswith(tuple(wanted)) for name in present)
        if not sound:
            there = ", ".join(f"{name} ({address})" for name, address in sorted(present.items()))
            raise ConfigError(
                f"{variable}={value}: {socket.gethostname()} has no such network interface with an address; it has {there}: "
                "correct the variable, or unset it and the interface that leads to rank 0 is taken"
            )


def choose_interface() -> None:
    """Set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface that leads to rank 0, where they are not set.

    Gloo otherwise takes the address that this host's name resolves to, which is a loopback address on Debian, and NCCL
    the first interface that it finds. MASTER_ADDR must be known.

    Raises:
        ConfigError: there are several interfaces to choose from.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    try:
        address = address_towards(os.environ["MASTER_ADDR"])
    except ConfigError as error:
        # IPv6 alone, for example: what fails fails when the ranks meet.
        logger.debug("no interface was chosen: %s", error)
        return
    if ip_address(address).is_loopback and _several_hosts():
        # Rank 0's own host, where MASTER_ADDR is a name of this host.
        address = own_address()
    name = next((interface.name for interface in interfaces() if interface.address == address), None)
    if name is None:
        return
    os.environ["GLOO_SOCKET_IFNAME"] = name
    # Without "=" NCCL would take every interface whose name begins so.
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")
    logger.debug("interface %s (%s)", name, address)


def address_towards(host: str) -> str:
    """This host's IPv4 address on the way to `host`.

    Raises:
        ConfigError: the name is not known, or no route leads there.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            # Sends nothing: it only asks the routing table.
            probe.connect((host, 9))
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(
            f"{socket.gethostname()} does not reach {host} ({error}): check the name in /etc/hosts or DNS, and the "
            "network"
        ) from None


def own_address() -> str:
    """The IPv4 address under which other hosts reach this one.

    The only one; or that of GLOO_SOCKET_IFNAME; or the one from which a default route leads away.

    Raises:
        ConfigError: none of these is there.
    """
    wanted_ones = [
        interface
        for interface in interfaces()
        if not ip_address(interface.address).is_loopback and not interface.name.startswith(VIRTUAL)
    ]
    if wanted := os.environ.get("GLOO_SOCKET_IFNAME"):
        wanted_ones = [interface for interface in interfaces() if interface.name == wanted]
    if len(wanted_ones) == 1:
        return wanted_ones[0].address
    try:
        towards = address_towards(OUTSIDE)
        return next(interface.address for interface in wanted_ones if interface.address == towards)
    except (ConfigError, StopIteration):
        pass
    names = ", ".join(f"{interface.name} ({interface.address})" for interface in wanted_ones) or "none"
    raise ConfigError(
        f"{socket.gethostname()}: which network leads to the other hosts? There are: {names}. Set GLOO_SOCKET_IFNAME "
        "to the name of one of its interfaces"
    )


def interfaces(any_family: bool = False) -> list[Interface]:
    """IPv4 addresses (or also IPv6) of interfaces that are up, in the system's order."""
    families = (socket.AF_INET, socket.AF_INET6) if any_family else (socket.AF_INET,)
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    return [
        Interface(name, entry.address, entry.netmask or "255.255.255.255")
        for name, entries in psutil.net_if_addrs().items()
        if name in up
        for entry in entries
        if entry.family in families
    ]


def _several_hosts() -> bool:
    local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    return local is not None and int(local) < int(os.environ["WORLD_SIZE"])
