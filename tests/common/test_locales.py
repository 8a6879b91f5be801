"""Names, texts and messages beyond ASCII, in processes whose locale knows nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
STRICT = {**ASCII, "PYTHONIOENCODING": "ascii"}
LATIN = {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "latin-1"}


def lander(
    directory: Path, environment: dict[str, str], *arguments: str
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "lander_ds", *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        timeout=200,
        check=False,
    )


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    home = tmp_path / "Übersetzung"
    shutil.copytree(GOLDEN, home / "modèle", ignore=shutil.ignore_patterns("run"))
    text = (GOLDEN / "recipe.yaml").read_text(encoding="utf-8").replace("path: base", "path: modèle/base")
    text = text.replace("./", "modèle/").replace("run_dir: run", "run_dir: läuft/один  # für später")
    (home / "recette.yaml").write_text(text, encoding="utf-8")
    return home


OPTIONS = ("--recipe", "recette.yaml", "--set", 'data.prompt.template="{src} » {tgt_lang} ="')


def test_a_stage_in_an_ascii_locale_reads_and_writes_everything(directory: Path) -> None:
    """And its standard output is ASCII whatever the locale says."""
    done = lander(directory, STRICT, "prepare", *OPTIONS)
    assert done.returncode == 0, done.stderr
    resolved = (directory / "läuft" / "один" / "recipe.resolved.yaml").read_text(encoding="utf-8")
    assert "path: modèle/base" in resolved
    assert "{src} » {tgt_lang} =" in resolved


@pytest.mark.parametrize("environment", [ASCII, STRICT, LATIN], ids=["locale", "output", "latin"])
def test_other_locales_are_told_everything(directory: Path, environment: dict[str, str]) -> None:
    dumped = lander(directory, environment, "config", *OPTIONS, "--dump")
    missing = lander(directory, environment, "summary", "nää")
    assert missing.returncode == 2
    assert (dumped.returncode, dumped.stderr) == (0, b"")
    assert "run_dir: läuft/один" in dumped.stdout.decode("utf-8")
    assert "nää does not exist" in missing.stderr.decode("utf-8")
