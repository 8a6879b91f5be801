"""What a host has of memory, disks, limits and tools, held against what the run needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lander_ds.cluster.doctor.compare import Looks
from lander_ds.cluster.doctor.finding import Finding, Status
from lander_ds.cluster.doctor.hostfile import Host
from lander_ds.cluster.doctor.judge import GIGABYTE, Run, readable

PROCESS_BYTES = int(0.6 * GIGABYTE)
"""What a rank takes in the host's memory before it holds anything: Python and the libraries."""
SHARED_MEMORY_BYTES = GIGABYTE
"""/dev/shm that NVIDIA asks containers with NCCL to have."""
TEMPORARY_BYTES = GIGABYTE
"""Room for compiled operators and caches."""


def judge_resources(run: Run, looks: Looks) -> list[Finding]:
    """Every host by itself, and the disk that all write to."""
    # The first host has counted for all.
    need = next((look["need"] for look in looks.values() if "device" in look.get("need", {})), None)
    findings: list[Finding] = []
    for host in run.hosts:
        look = looks.get(host.name)
        if look is not None:
            findings += _limits(run, host, look)
            findings += _compiler(run, host, look)
            findings += _temporary(host, look)
            if need is not None:
                findings += _memory(host, look, need)
    if need is not None:
        findings += _disk(looks, need)
    return findings


def _limits(run: Run, host: Host, look: Mapping[str, Any]) -> Iterable[Finding]:
    limits = look["limits"]
    if "error" in limits:
        return
    files = limits["open_files"]
    # Each rank: its sockets to the others, twice, and files of libraries, model and data.
    need = 256 + 4 * run.world
    if 0 <= files < need:
        cure = f"raise it there: ulimit -n, nofile in /etc/security/limits.conf, or LimitNOFILE of sshd ({need} or more)"
        yield Finding(
            "open_files", host.name, "fail", f"at most {files} open files per process, needed {need}", cure
        )
    else:
        yield Finding(
            "open_files",
            host.name,
            "ok",
            f"{files if files >= 0 else 'any number of'} open files per process",
        )
    locked = limits["locked_memory"]
    if limits["infiniband"] and locked >= 0:
        detail = f"InfiniBand cards, but at most {readable(locked)} of locked memory"
        cure = (
            "set memlock to unlimited in /etc/security/limits.conf, or give the container --ulimit memlock=-1"
        )
        yield Finding("locked_memory", host.name, "fail", detail, cure)
    else:
        detail = (
            "unlimited" if locked < 0 else f"{readable(locked)}; no InfiniBand cards that would need more"
        )
        yield Finding("locked_memory", host.name, "ok", detail)


def _compiler(run: Run, host: Host, look: Mapping[str, Any]) -> Iterable[Finding]:
    tools = look["tools"]
    if "error" in tools or not run.offloads("optimizer"):
        return
    missing = [name for name in ("compiler", "ninja") if tools[name] is None]
    if "compiler" in missing:
        detail = "offload_optimizer compiles DeepSpeed's CPU optimizer, and there is no C++ compiler"
        yield Finding(
            "compiler", host.name, "fail", detail, "install one (Debian: g++), or remove offload_optimizer"
        )
    if "ninja" in missing:
        detail = "offload_optimizer compiles DeepSpeed's CPU optimizer, and there is no ninja on the PATH"
        cure = "write PATH=... into .deepspeed_env, with the directory of Python, which holds ninja, in front"
        yield Finding("compiler", host.name, "fail", detail, cure)
    if not missing:
        yield Finding("compiler", host.name, "ok", f"{tools['compiler']}, {tools['ninja']}")


def _memory(host: Host, look: Mapping[str, Any], need: Mapping[str, Any]) -> Iterable[Finding]:
    """At least what is needed; activations and buffers come on top."""
    if "error" in look["machine"]:
        return
    cards = look["accelerator"].get("cards", [])
    in_memory = host.slots * (PROCESS_BYTES + need["host"] + (0 if cards else need["device"]))
    held = [("memory", f"{host.slots} ranks hold", in_memory, look["machine"]["free_memory"])]
    if cards:
        held.append(("gpu_memory", "a rank's GPU holds", need["device"], min(card["free"] for card in cards)))
    for check, who, bytes_held, free in held:
        detail = f"{who} at least {readable(bytes_held)}, {readable(free)} are free"
        if bytes_held > free:
            cure = (
                "use more hosts, another topology, offloading or a smaller model; lander plan compares them"
            )
            yield Finding(check, host.name, "fail", detail, cure)
        else:
            yield Finding(check, host.name, "ok", detail)


def _disk(looks: Looks, need: Mapping[str, Any]) -> Iterable[Finding]:
    """Room for checkpoints and exports where the run directory lies: seen from the first host, where rank 0 is."""
    host, look = next(iter(looks.items()))
    disk = look.get("disk", {})
    if disk.get("free") is None:
        return
    wanted = need["checkpoint"] * need["checkpoints"] + need["exports"]
    detail = (
        f"{'about ' if need['estimated'] else ''}{readable(wanted)} needed ({need['checkpoints']} checkpoints of "
        f"{readable(need['checkpoint'])}, exports {readable(need['exports'])}), {readable(disk['free'])} free in "
        f"{disk['run_dir']}"
    )
    if wanted > disk["free"]:
        cure = "make room, choose another run_dir, or set train.keep_last to keep fewer checkpoints"
        yield Finding("disk", host, "fail", detail, cure)
    else:
        yield Finding("disk", host, "ok", detail)


def _temporary(host: Host, look: Mapping[str, Any]) -> Iterable[Finding]:
    if "error" in look["temporary"]:
        return
    for place, free in look["temporary"].items():
        shared = place == "/dev/shm"
        check = "shared_memory" if shared else "temporary"
        if free is None:
            yield Finding(check, host.name, "fail", f"{place} is not there", f"make the directory {place}")
            continue
        # Gloo does not use shared memory.
        need = (
            TEMPORARY_BYTES if not shared else SHARED_MEMORY_BYTES if look["accelerator"].get("cards") else 0
        )
        detail = f"{readable(free)} free in {place}"
        if free < need:
            status: Status = "fail" if free < need // 10 else "warn"
            cure = (
                "remount it larger; in a container give --shm-size" if shared else "make room, or set TMPDIR"
            )
            yield Finding(check, host.name, status, f"{detail}, {readable(need)} wanted", cure)
        else:
            yield Finding(check, host.name, "ok", detail)
