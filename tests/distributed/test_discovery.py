"""Ranks and network interfaces where no launcher tells them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from lander_ds.common.errors import ConfigError
from lander_ds.distributed import discovery
from lander_ds.distributed.discovery import (
    Interface,
    check_interfaces,
    choose_interface,
    discover,
    own_address,
)
from lander_ds.distributed.process_group import free_port

LOOPBACK = Interface("lo", "127.0.0.1", "255.0.0.0")
ETHERNET = Interface("eth0", "192.0.2.17", "255.255.255.0")
INFINIBAND = Interface("ib0", "198.51.100.17", "255.255.0.0")
BRIDGE = Interface("docker0", "172.17.0.1", "255.255.0.0")
NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NAMES, "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def have(monkeypatch: pytest.MonkeyPatch, *interfaces: Interface, towards: str = "") -> None:
    """A host with these interfaces, of which one leads to rank 0."""

    def address(host: str) -> str:
        if not towards:
            raise ConfigError("no way")
        return towards

    monkeypatch.setattr(discovery, "interfaces", lambda any_family=False: list(interfaces))
    monkeypatch.setattr(discovery, "address_towards", address)


def test_one_host_talks_over_its_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    choose_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    assert os.environ["NCCL_SOCKET_IFNAME"] == "=lo"


def test_what_is_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    choose_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"
    assert "NCCL_SOCKET_IFNAME" not in os.environ


def test_the_way_to_rank_0_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "node1")
    have(monkeypatch, LOOPBACK, ETHERNET, INFINIBAND, towards=INFINIBAND.address)
    choose_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"


def test_rank_0_whose_own_name_leads_to_its_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "node1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    have(monkeypatch, LOOPBACK, BRIDGE, ETHERNET, towards="127.0.1.1")
    choose_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth0"


def test_an_unknown_way_is_left_to_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "2001:db8::1")
    have(monkeypatch, LOOPBACK, ETHERNET)
    choose_interface()
    assert "GLOO_SOCKET_IFNAME" not in os.environ


def test_the_default_route_decides_between_two(monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, LOOPBACK, ETHERNET, INFINIBAND, towards=ETHERNET.address)
    assert own_address() == ETHERNET.address


def test_two_networks_without_a_default_route_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, LOOPBACK, ETHERNET, INFINIBAND)
    with pytest.raises(ConfigError, match=r"eth0 \(192.0.2.17\), ib0 .*Set GLOO_SOCKET_IFNAME"):
        own_address()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    assert own_address() == INFINIBAND.address


@pytest.mark.parametrize("variable", ["GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"])
def test_interfaces_that_there_are_stand_in_the_refusal(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    have(monkeypatch, LOOPBACK, ETHERNET, INFINIBAND)
    monkeypatch.setenv(variable, "enp9s0")
    there = r"eth0 \(192.0.2.17\), ib0 \(198.51.100.17\), lo \(127.0.0.1\): correct the variable"
    with pytest.raises(ConfigError, match=f"^{variable}=enp9s0: .* has no such network interface .*{there}"):
        check_interfaces(variable)


def test_interfaces_of_this_host() -> None:
    assert LOOPBACK in discovery.interfaces()
    assert discovery.address_towards("127.0.0.1") == "127.0.0.1"
    with pytest.raises(ConfigError, match=r"does not reach no-such-host\.invalid"):
        discovery.address_towards("no-such-host.invalid")


def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set"):
        discover()


def test_a_complete_environment_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node1", "MASTER_PORT": "1"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    discover()
    assert {name: os.environ[name] for name in given} == given


SHOW = """
import os
from lander_ds.distributed.discovery import discover
discover()
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
os.write(1, (" ".join(os.environ[name] for name in names) + "\\n").encode())
"""


@pytest.mark.distributed
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs Open MPI (Debian: openmpi-bin)")
def test_mpi4py_tells_the_ranks_of_mpirun() -> None:
    port = str(free_port())
    command = [
        "mpirun",
        "-n",
        "2",
        "--oversubscribe",
        "--allow-run-as-root",
        "-x",
        "MASTER_PORT",
        "-x",
        "MASTER_ADDR",
    ]
    done = subprocess.run(
        [*command, sys.executable, "-c", SHOW],
        env={**os.environ, "MASTER_PORT": port, "MASTER_ADDR": "node9"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"0 0 2 2 node9 {port}", f"1 1 2 2 node9 {port}"]


def test_another_mpi_than_mpiruns_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise every rank would train alone, and all of them end with 0."""
    code = "from lander_ds.distributed.discovery import discover; discover()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PMI_SIZE": "2"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    if "cannot load MPI" in done.stderr:
        pytest.skip("there is no MPI library here")
    assert "mpirun has started 2 ranks, but mpi4py knows of 1" in done.stderr


@pytest.mark.parametrize(
    ("variable", "value", "sound"),
    [
        ("GLOO_SOCKET_IFNAME", "lo", True),
        ("GLOO_SOCKET_IFNAME", "nowhere0", False),
        ("GLOO_SOCKET_IFNAME", "lo,nowhere0", False),
        ("NCCL_SOCKET_IFNAME", "l", True),
        ("NCCL_SOCKET_IFNAME", "=l", False),
        ("NCCL_SOCKET_IFNAME", "=lo", True),
        ("NCCL_SOCKET_IFNAME", "nowhere,lo", True),
        ("NCCL_SOCKET_IFNAME", "nowhere", False),
        ("NCCL_SOCKET_IFNAME", "^docker", True),
        ("NCCL_SOCKET_IFNAME", "", True),
    ],
)
def test_interfaces_that_do_not_exist_are_refused(
    variable: str, value: str, sound: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    if sound:
        check_interfaces(variable)
        return
    with pytest.raises(
        ConfigError,
        match=rf"{variable}={value}: .* has no such network interface with an address; it has .*\blo\b",
    ):
        check_interfaces(variable)
