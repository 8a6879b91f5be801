"""Which variables DeepSpeed's launcher gives to other hosts: those with some prefixes, and those in `.deepspeed_env`.

Its reader of that file stops with a traceback at a line without "=", such as a blank one, and the lines reach the
remote shells as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lander_ds.cluster.doctor.finding import Finding

CHECK = "environment"

EXPORTED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
"""Prefixes that DeepSpeed 0.19 exports (a test compares them with its source)."""

FILE = ".deepspeed_env"

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

_MATTER = re.compile(
    "(CUDA|GLOO|TORCH|PYTORCH|OMP|MKL|KMP|HF|TRANSFORMERS|TOKENIZERS|DEEPSPEED|DS|LANDER|FI|IBV|TRITON)_.*"
    "|LD_LIBRARY_PATH|OPENBLAS_NUM_THREADS"
)
"""Variables that change how a rank runs."""

_NOT_MEANT_TO_TRAVEL = ("CUDA_VISIBLE_DEVICES", "DS_ENV_FILE")


@dataclass(frozen=True)
class Travelling:
    """What other hosts get to see of this host's environment."""

    variables: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


def travelling(environment: Mapping[str, str], directory: Path) -> Travelling:
    """The variables that DeepSpeed's launcher would set on every host, and what is wrong with them.

    Args:
        environment: of this process.
        directory: where the launcher is started; the home directory is looked into as well.
    """
    variables = {name: value for name, value in environment.items() if name.startswith(EXPORTED)}
    # As the launcher does: what is imported from the current directory here is imported from it there.
    variables["PYTHONPATH"] = ":".join(filter(None, (str(directory), environment.get("PYTHONPATH"))))
    findings: list[Finding] = []
    name = environment.get("DS_ENV_FILE", FILE)
    paths = dict.fromkeys(
        directory_of / name for directory_of in (Path(environment.get("HOME", "~")).expanduser(), directory)
    )
    for path in paths:
        if path.is_file():
            read, wrong = read_environment_file(path)
            variables.update(read)
            findings += wrong
    staying = sorted(
        name
        for name, value in environment.items()
        if _MATTER.fullmatch(name) and name not in _NOT_MEANT_TO_TRAVEL and variables.get(name) != value
    )
    if staying:
        detail = f"set here, but not on the other hosts: {', '.join(staying)}"
        cure = f"if the ranks need them, write each as NAME=value into {directory / FILE}"
        findings.append(Finding(CHECK, "", "warn", detail, cure))
    if not findings:
        findings.append(Finding(CHECK, "", "ok", f"{len(variables)} variables reach the other hosts"))
    return Travelling(variables, findings)


def read_environment_file(path: Path) -> tuple[dict[str, str], list[Finding]]:
    """The variables in a `.deepspeed_env`, and its faults with their lines."""
    variables: dict[str, str] = {}
    findings: list[Finding] = []

    def fail(number: int, what: str, cure: str) -> None:
        findings.append(Finding(CHECK, "", "fail", f"{path}, line {number}: {what}", cure))

    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        return {}, [Finding(CHECK, "", "fail", f"{path} cannot be read ({error})", "correct or remove it")]
    for number, line in enumerate(lines, 1):
        name, equals, value = (part.strip() for part in line.partition("="))
        if not line.strip():
            fail(number, "a blank line stops DeepSpeed's launcher", "remove the line")
        elif line.strip().startswith("#"):
            fail(number, "DeepSpeed knows no comments in this file", "remove the line")
        elif not equals:
            fail(number, f"{line.strip()!r} has no =", "write NAME=value")
        elif name.startswith("export "):
            fail(
                number,
                f"{name!r} is no name of a variable",
                f"write {name.removeprefix('export ').strip()}={value}",
            )
        elif not _NAME.fullmatch(name):
            fail(number, f"{name!r} is no name of a variable", "write NAME=value")
        elif any(character in value for character in '"`$\\'):
            fail(
                number, f"the remote shell would change the value of {name}", 'write it without " ` $ and \\'
            )
        else:
            variables[name] = value
    return variables, findings
