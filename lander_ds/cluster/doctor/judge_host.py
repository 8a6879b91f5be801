"""What every host found, held against what the run needs: slots, accelerator, interfaces, recipe."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lander_ds.cluster.doctor.compare import Looks
from lander_ds.cluster.doctor.finding import Finding, Status
from lander_ds.cluster.doctor.hostfile import Host
from lander_ds.cluster.doctor.judge import Run
from lander_ds.cluster.doctor.judge_resources import judge_resources
from lander_ds.distributed import vectors

DEPENDENT = ("topology", "need", "disk")
"""Parts that cannot be looked at without a sound recipe: their faults are its faults."""

PART_CURES = {
    "accelerator": "see that PyTorch starts there: python -c 'import torch'",
    "need": "correct model.path, or run stages detect and select again",
    "topology": "install the versions in requirements.txt on all hosts",
    "recipe": "correct the recipe, or bring what it names to this host",
}


def judge_hosts(run: Run, looks: Looks) -> list[Finding]:
    """Every host by itself."""
    findings = _same_machines(looks)
    for host in run.hosts:
        look = looks.get(host.name)
        if look is not None:
            cards = look["accelerator"].get("cards", [])
            findings += _broken_parts(host, look)
            findings += _slots(host, look, cards)
            findings += _accelerator(run, host, look, cards)
            findings += _interface(run, host, look, cards)
    return findings + judge_resources(run, looks)


def _same_machines(looks: Looks) -> list[Finding]:
    seen: dict[str, str] = {}
    findings = []
    for host, look in looks.items():
        identity = look["machine"].get("identity")
        first = seen.setdefault(identity, host) if identity else host
        if first != host:
            # Two sets of ranks would take the same GPUs; cores they can share.
            status: Status = "fail" if look["accelerator"].get("cards") else "warn"
            detail = f"is the same machine as {first}"
            cure = f"keep one line of the hostfile, with the slots of both: {first}"
            findings.append(Finding("same_machine", host, status, detail, cure))
    return findings


def _broken_parts(host: Host, look: Mapping[str, Any]) -> Iterable[Finding]:
    without_recipe = "error" in look.get("recipe", {})
    for part, own in look.items():
        if part in DEPENDENT and without_recipe:
            continue
        if "error" in own:
            cure = PART_CURES.get(part, "see that the host is an ordinary Linux system")
            yield Finding(part, host.name, "fail", str(own["error"]), cure)
        elif part == "topology":
            yield Finding(part, host.name, "ok", "the installed DeepSpeed fits")
        elif part == "recipe" and own["warning"]:
            detail = f"training can run, other stages cannot: {own['warning']}"
            yield Finding("stages", host.name, "warn", detail, PART_CURES["recipe"])


def _slots(host: Host, look: Mapping[str, Any], cards: Sequence[Mapping[str, Any]]) -> Iterable[Finding]:
    if "error" in look["accelerator"] or "error" in look["machine"]:
        return
    cores, slots = look["machine"]["cores"], host.slots
    if cards and slots > len(cards):
        detail = f"slots={slots}, but PyTorch sees {len(cards)} GPUs"
        cure = f"write slots={len(cards)}; if there are more, check driver and CUDA_VISIBLE_DEVICES"
        yield Finding("slots", host.name, "fail", detail, cure)
    elif cards and slots < len(cards):
        detail = f"slots={slots}, {len(cards) - slots} of {len(cards)} GPUs stay idle"
        yield Finding("slots", host.name, "warn", detail, f"write slots={len(cards)} to use all")
    elif not cards and slots > cores:
        detail = f"slots={slots}, but only {cores} cores: ranks take turns"
        yield Finding("slots", host.name, "warn", detail, f"write slots={cores} or less")
    else:
        yield Finding(
            "slots", host.name, "ok", f"slots={slots}, {f'{len(cards)} GPUs' if cards else f'{cores} cores'}"
        )


def _accelerator(
    run: Run, host: Host, look: Mapping[str, Any], cards: Sequence[Mapping[str, Any]]
) -> Iterable[Finding]:
    own = look["accelerator"]
    if "error" in own:
        return
    if cards and own["nccl"] is None:
        cure = "install a PyTorch with CUDA and NCCL"
        yield Finding("accelerator", host.name, "fail", "GPUs, but this PyTorch has no NCCL", cure)
    elif cards:
        names = ", ".join(dict.fromkeys(card["name"] for card in cards))
        detail = f"{len(cards)} x {names}, CUDA {own['cuda']}, NCCL {own['nccl']}"
        yield Finding("accelerator", host.name, "ok", detail)
    elif own["driver"]:
        detail = f"an NVIDIA driver, but PyTorch (built for CUDA: {own['cuda'] or 'no'}) sees no GPU"
        cure = "install a PyTorch with CUDA that fits the driver; check CUDA_VISIBLE_DEVICES and container options"
        yield Finding("accelerator", host.name, "fail", detail, cure)
    elif not own["gloo"]:
        yield Finding(
            "accelerator", host.name, "fail", "no GPU, and a PyTorch without gloo", "install another PyTorch"
        )
    elif run.recipe is not None and vectors.imitate(own["vectors"], run.recipe.model.dtype):
        dtype = run.recipe.model.dtype
        detail = f"no GPU, and a processor ({own['vectors']}) that imitates {dtype}, several times slower than float32"
        yield Finding("accelerator", host.name, "warn", detail, "set model.dtype=float32 where memory allows")
    else:
        yield Finding("accelerator", host.name, "ok", "no GPU: CPU and gloo")


def _interface(
    run: Run, host: Host, look: Mapping[str, Any], cards: Sequence[Mapping[str, Any]]
) -> Iterable[Finding]:
    """The network interface that gloo and NCCL will take."""
    network = look["network"]
    if "error" in network:
        return
    settings, interfaces, leading = network["settings"], network["interfaces"], network["leading"]
    variable = "NCCL_SOCKET_IFNAME" if cards else "GLOO_SOCKET_IFNAME"
    chosen = settings.get(variable)
    cure = f"write {variable}={leading or 'INTERFACE'} into .deepspeed_env"
    if chosen is not None and not _exist(chosen, interfaces):
        detail = f"{variable}={chosen}, but the interfaces are {', '.join(interfaces)}"
        yield Finding("interface", host.name, "fail", detail, cure)
        return
    if run.several and not cards and chosen is None:
        resolved = network["resolved"]
        if resolved is None or ipaddress.ip_address(resolved).is_loopback:
            what = "to nothing" if resolved is None else f"to {resolved}, where no other host can reach it"
            detail = f"the host's name resolves {what}; gloo would take that address"
            yield Finding("interface", host.name, "fail", detail, f"{cure}, or correct /etc/hosts")
            return
    detail = f"{variable}={chosen}" if chosen else f"{leading or 'lo'} leads to the other ranks"
    yield Finding("interface", host.name, "ok", detail)


def _exist(setting: str, interfaces: Mapping[str, Any]) -> bool:
    """Whether some interface is meant by a list of names (gloo), or of beginnings, `=` names and `^` others (NCCL)."""
    if setting.startswith("^"):
        return True
    wanted = setting.lstrip("=").split(",")
    return any(name == want or name.startswith(want) for want in wanted for name in interfaces)
