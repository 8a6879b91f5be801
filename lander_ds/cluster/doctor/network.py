"""Whether the hosts reach one another: DeepSpeed's launcher, the port where ranks meet, and ranks that communicate."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lander_ds.cluster.doctor.finding import Finding
from lander_ds.cluster.doctor.fleet import Fleet
from lander_ds.cluster.doctor.judge import judge_bandwidths
from lander_ds.cluster.doctor.remote import Answer, Connection

MARGIN_SECONDS = 10.0
"""How much longer than ranks may take their host is waited for."""

_COLLECTIVE_CURE = (
    "open all ports between the hosts; if an address is wrong, name the interface with GLOO_SOCKET_IFNAME or "
    "NCCL_SOCKET_IFNAME in .deepspeed_env; NCCL_DEBUG=INFO tells more"
)


@dataclass(frozen=True)
class Rendezvous:
    """Where ranks meet."""

    host: str
    """Where rank 0 is."""
    address: str
    port: int


def try_pdsh(fleet: Fleet, ssh_port: int | None, seconds: float) -> None:
    """Whether DeepSpeed's default launcher is installed here and reaches all hosts."""
    port = "" if ssh_port is None else f" -p {ssh_port}"
    arguments = f"{os.environ.get('PDSH_SSH_ARGS_APPEND', '')}{port} -oBatchMode=yes"
    environment = {**os.environ, "PDSH_RCMD_TYPE": "ssh", "PDSH_SSH_ARGS_APPEND": arguments}
    command = ["pdsh", "-S", "-w", ",".join(fleet.names), "echo lander"]
    try:
        said = _run(command, environment, seconds)
    except FileNotFoundError:
        cure = "install it (Debian: pdsh), or choose another launcher and pass --launcher ssh"
        fleet.add("pdsh", "", "fail", "DeepSpeed's default launcher is not installed on this machine", cure)
        return
    for host in fleet.names:
        if f"{host}: lander" in said:
            fleet.add("pdsh", host, "ok", "reached by pdsh")
        else:
            why = [line for line in said if line.startswith((f"{host}:", "pdsh"))]
            detail = f"not reached by pdsh ({why[-1] if why else 'no answer'})"
            cure = "see that pdsh has its ssh module, and that plain ssh (~/.ssh/config) reaches the host"
            fleet.add("pdsh", host, "fail", detail, cure)


def rendezvous(fleet: Fleet, point: Rendezvous) -> bool:
    """Whether the port is free, and reached from all hosts as ranks will reach it."""
    host, address, port, token = point.host, point.address, point.port, secrets.token_hex(8)
    opened = fleet.ask("listen", [host], port=port, token=token)
    if host not in opened:
        return False
    if error := opened[host]["error"]:
        cure = "end the other run that uses it, or choose another: --master_port for deepspeed, --master-port here"
        fleet.add("rendezvous", host, "fail", f"port {port} cannot be opened ({error})", cure)
        return False
    answers = fleet.ask("connect", address=address, port=port, token=token)
    fleet.ask("unlisten", [host])
    for name, answer in answers.items():
        if error := answer["error"]:
            cure = (
                f"open the firewall between the hosts; if {address} is not in their network, pass --master_addr to "
                "deepspeed and --master-addr here"
            )
            fleet.add(
                "rendezvous", name, "fail", f"does not reach {address}:{port} on {host} ({error})", cure
            )
        else:
            detail = f"reaches {address}:{port} on {host} in {1000 * answer['seconds']:.1f} ms"
            fleet.add("rendezvous", name, "ok", detail)
    return all(not answer["error"] for answer in answers.values())


def ranks_on(slots: int, look: Mapping[str, Any], several: bool) -> int:
    """Ranks of the test on a host: one per GPU that is used. Without GPUs one, or two on a host that is alone."""
    cards = len(look["accelerator"].get("cards", ()))
    if cards:
        return min(slots, cards)
    return 1 if several else min(slots, 2)


def communicate(fleet: Fleet, counts: Mapping[str, int], point: Rendezvous, seconds: float) -> dict[str, Any]:
    """Start ranks on all hosts, have them add up and send messages, and time it.

    Args:
        fleet: the hosts.
        counts: host -> ranks; the meeting's host is the first.
        point: where they meet.
        seconds: how long they may take.

    Returns: `backend`, `ranks`, `all_reduce` and `point_to_point`; empty when something failed.
    """
    beginnings = {host: sum(list(counts.values())[:position]) for position, host in enumerate(counts)}
    world = sum(counts.values())
    leaders = list(beginnings.values()) if len(counts) > 1 else list(range(world))

    def run(host: str, connection: Connection) -> Answer:
        return connection.ask(
            "run_ranks",
            within=seconds + MARGIN_SECONDS,
            first=beginnings[host],
            count=counts[host],
            world=world,
            leaders=leaders,
            address=point.address,
            port=point.port,
            limit=seconds,
        )

    answers = fleet.each(run, list(counts))
    owner = {beginnings[host] + local: host for host, count in counts.items() for local in range(count)}
    for host, answer in answers.items():
        if "ranks" not in answer:
            fleet.add(
                "collective", host, "fail", f"no rank could be started ({answer['error']})", _COLLECTIVE_CURE
            )
    results = sorted(
        (result for answer in answers.values() for result in answer.get("ranks", ())),
        key=lambda one: one["rank"],
    )
    for result in results:
        if "error" in result:
            detail = f"rank {result['rank']}, {result['doing']}: {result['error']}"
            fleet.add("collective", owner[result["rank"]], "fail", detail, _COLLECTIVE_CURE)
    if len([result for result in results if "error" not in result]) < world:
        return {}
    backend, reduced = results[0]["backend"], results[0]["all_reduce"]
    fleet.add("collective", "", "ok", f"{world} ranks add up correctly over {backend}")
    messages = _named([message for result in results for message in result["messages"]], owner)
    return {"backend": backend, "ranks": world, "all_reduce": reduced, "point_to_point": messages}


def slow_connections(bandwidth: Mapping[str, Any]) -> list[Finding]:
    """Connections that are slower than the others."""
    return judge_bandwidths(bandwidth.get("point_to_point", ()))


def _named(messages: Sequence[Mapping[str, Any]], owner: Mapping[int, str]) -> list[dict[str, Any]]:
    """Messages between hosts instead of ranks, where there are several hosts."""
    several = len(set(owner.values())) > 1

    def name(rank: int) -> str:
        return owner[rank] if several else f"rank {rank}"

    return [{**message, "from": name(message["from"]), "to": name(message["to"])} for message in messages]


def _run(command: Sequence[str], environment: Mapping[str, str], seconds: float) -> list[str]:
    """The lines that a command writes; it and what it started are killed after `seconds`.

    Raises:
        FileNotFoundError: there is no such command.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env=dict(environment),
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return [line.strip() for line in output.splitlines()]
