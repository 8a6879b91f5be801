"""Hosts of a cluster on this machine: a stand-in for ssh that runs each host's commands in an environment of its own."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lander_ds
from lander_ds.cli.main import main
from support.workspace import Workspace

SSH = """\
#!/bin/bash
while [[ "$1" == -* ]]; do shift 2; done
host="$1"; shift
command="$*"
export {marker}=1
[[ -f "{root}/$host.sh" ]] && source "{root}/$host.sh"
exec bash -c "$command"
"""

CLOCK = """\
import time
_real = time.time
time.time = lambda: _real() + {seconds}
"""


@dataclass
class FakeHosts:
    """A workspace with a model, a hostfile and hosts that can be spoiled."""

    workspace: Workspace
    root: Path
    marker: str = field(default_factory=lambda: f"DOCTOR_TEST_{secrets.token_hex(4)}")

    def __post_init__(self) -> None:
        write_model(self.workspace.path / "model")
        self.root.mkdir()
        self.ssh = self.root / "ssh"
        self.ssh.write_text(SSH.format(marker=self.marker, root=self.root))
        self.ssh.chmod(0o755)
        self.hostfile = self.root / "hosts"
        # Real hosts' names do not lead to the loopback interface; this machine's may.
        interface = next(name for _, name in socket.if_nameindex() if name == "lo")
        for name in ("one", "two"):
            self.set_up(name, f"export GLOO_SOCKET_IFNAME={interface}")
        self.name("one", "two")

    def name(self, *hosts: str) -> None:
        """Write the hostfile."""
        self.hostfile.write_text("".join(f"{host} slots=1\n" for host in hosts))

    def set_up(self, host: str, script: str) -> None:
        """What happens on `host` before each command (bash; it may change `command`)."""
        (self.root / f"{host}.sh").write_text(script + "\n")

    def other_directory(self, name: str) -> Path:
        """A copy of the workspace, for a host where the same path is another directory."""
        return Path(shutil.copytree(self.workspace.path, self.root / name))

    def broken_python(self, name: str, clock: float = 0.0, package: str = "") -> Path:
        """A directory for PYTHONPATH with another source of lander_ds, a clock that is off, and another package."""
        path = self.root / name
        shutil.copytree(
            Path(lander_ds.__file__).parent, path / "lander_ds", ignore=shutil.ignore_patterns("*.pyc")
        )
        with (path / "lander_ds" / "run.py").open("a") as source:
            source.write("# another source\n")
        (path / "sitecustomize.py").write_text(CLOCK.format(seconds=clock))
        if package:
            metadata = path / f"{package}.dist-info"
            metadata.mkdir()
            title, version = package.split("-")
            (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {title}\nVersion: {version}\n")
        return path

    def doctor(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
        """Run `lander doctor --json` here; its exit code and what it printed."""
        command = [
            "doctor",
            "--recipe",
            "recipe.yaml",
            "--hostfile",
            str(self.hostfile),
            "--ssh",
            str(self.ssh),
        ]
        code = exit_code([*command, "--launcher", "ssh", "--json", *arguments])
        return code, json.loads(capsys.readouterr().out)

    def processes_left(self) -> list[str]:
        """Command lines of processes that a host has started and that still run."""
        left = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if self.marker.encode() in (process / "environ").read_bytes():
                    left.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
        return left


def replacing(old: object, new: object) -> str:
    """A host's script that changes every command: there, `new` stands for `old`."""
    return f'old="{old}" new="{new}" && command="${{command//"$old"/"$new"}}"'


def exit_code(arguments: list[str]) -> int:
    """Of `lander`, which ends by SystemExit where a check failed."""
    try:
        return main(arguments)
    except SystemExit as end:
        return int(end.code or 0)


def failed(report: dict[str, Any]) -> dict[str, set[str]]:
    """Host -> checks that failed there."""
    actual: dict[str, set[str]] = {}
    for check in report["checks"]:
        if check["status"] == "fail":
            assert check["cure"], check
            actual.setdefault(check["host"], set()).add(check["check"])
    return actual


def write_model(path: Path, seed: int = 0) -> None:
    """A small Llama with six layers."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=6, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(path)


def files(directory: Path) -> set[str]:
    """Every file and directory below, hidden ones too."""
    return {os.fspath(path.relative_to(directory)) for path in directory.rglob("*")}
