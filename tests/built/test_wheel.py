"""What a wheel and a source distribution hold, and that the wheel's commands run without the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.tiny_models import save_roomy
from support.tiny_run import SAMPLE

ROOT = Path(__file__).parents[2]
SOURCES = (
    "lander_ds",
    "ds_configs",
    "recipes",
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is built, because setuptools leaves `build/` and `*.egg-info` behind."""
    copy = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


def build(sources: Path, kind: str, target: Path) -> Path:
    """A `wheel` or `sdist`, without network, by the setuptools that is installed."""
    pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools 77")
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(target)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=sources, check=False, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel."""
    return build(sources, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the wheel's content, as pip would install it."""
    target = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def shipped(root: Path) -> Iterator[str]:
    """DeepSpeed JSONs and recipes, by their paths in the repository."""
    for path in [*root.glob("ds_configs/*/*.json"), *root.glob("recipes/*.yaml")]:
        yield str(path.relative_to(root))


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"lander_ds"}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "lander_ds").rglob("*.py")}
    assert modules <= names
    assert {
        f"lander_ds/{name}" for name in ("py.typed", "report/report.html.j2", "report/report.css")
    } <= names
    expected = {f"lander_ds/shipped/{name}" for name in shipped(ROOT)}
    assert len(expected) > 30
    assert {name for name in names if "/shipped/" in name} == expected


def test_the_source_distribution_builds_the_same_wheel(sources: Path, wheel: Path, tmp_path: Path) -> None:
    archive = build(sources, "sdist", tmp_path)
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    again = build(unpacked, "wheel", tmp_path)
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        assert set(one.namelist()) == set(other.namelist())


def lander(installed: Path, directory: Path, *arguments: str) -> str:
    """What the installed command prints, outside the repository."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    # Before the repository, which an editable installation adds.
    environment |= {"PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "lander_ds", *arguments],
        cwd=directory,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_its_commands_run_without_the_repository(installed: Path, tmp_path: Path) -> None:
    assert "lander [-h] [--version] COMMAND" in lander(installed, tmp_path, "--help")
    flags = ("--model", str(save_roomy(tmp_path / "model")), "--pairs", "en-de,en-fr")
    corpora = [
        flag
        for split in ("train", "valid", "test")
        for flag in (f"--{split}", f"{SAMPLE}/{split}.{{pair}}.jsonl")
    ]
    written = lander(installed, tmp_path, "init", *flags, *corpora, "--output", "mine.yaml")
    assert "lander all --recipe mine.yaml" in written
    dumped = lander(installed, tmp_path, "config", "--recipe", "mine.yaml", "--dump")
    assert "deepspeed: mine.zero3.json" in dumped
    assert "usage: lander doctor" in lander(installed, tmp_path, "doctor", "--help")
