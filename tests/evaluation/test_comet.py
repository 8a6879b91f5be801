"""The scores of unbabel-comet itself, on tiny models: stage score says what the library and its command say.

The interpreter that has the package is named by LANDER_COMET_PYTHON (launchers/comet_env.sh makes one).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from statistics import fmean

import pytest
from support.neural import translated_run

from lander_ds.config.schema.neural import NeuralConfig
from lander_ds.evaluation.neural import PYTHON_VARIABLE
from lander_ds.inference.translations import read_translations
from lander_ds.stages import score

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        PYTHON_VARIABLE not in os.environ,
        reason=f"{PYTHON_VARIABLE} names no interpreter with unbabel-comet (launchers/comet_env.sh makes one)",
    ),
]
MAKE = Path(__file__).parents[1] / "support" / "make_comet.py"
COUNT = 40


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints `comet` and `kiwi`, and what the library says with them of the trained system's translations."""
    root = tmp_path_factory.mktemp("comet")
    _, run = translated_run(root / "run", {}, count=COUNT)
    translations = read_translations(run.translations / "trained" / "en-de.jsonl")
    for name, field in (("src", "src"), ("mt", "hyp"), ("ref", "ref")):
        text = "".join(f"{getattr(one, field)}\n" for one in translations)
        (root / name).write_text(text, encoding="utf-8")
    made = subprocess.run(
        [os.environ[PYTHON_VARIABLE], "-I", MAKE, root],
        capture_output=True,
        text=True,
        check=False,
        timeout=540,
    )
    assert made.returncode == 0, made.stderr
    return root


@pytest.mark.timeout(1200)
def test_scores_are_those_of_the_library(models: Path, tmp_path: Path) -> None:
    # `kiwi` is a checkpoint, and is given no reference.
    metrics = {
        "comet": NeuralConfig(str(models / "comet")),
        "half": NeuralConfig(str(models / "comet"), dtype="float16"),
        "kiwi": NeuralConfig(str(models / "kiwi" / "checkpoints" / "model.ckpt")),
    }
    recipe, run = translated_run(tmp_path, metrics, count=COUNT)
    score.run(recipe, run)
    scores = json.loads(run.scores.read_text())
    figures = scores["pairs"]["en-de"]["systems"]["trained"]
    said = {name: json.loads((models / f"{name}.json").read_text()) for name in ("comet", "kiwi")}
    for name in ("comet", "kiwi"):
        assert figures[name] == pytest.approx(fmean(said[name]["interface"]), abs=1e-6)
        assert figures[name] == pytest.approx(fmean(said[name]["command"]), abs=1e-3)
    # Sentences of other systems share their batches, which changes the padding and so the rounding in float16.
    assert figures["half"] == pytest.approx(fmean(said["comet"]["command"]), abs=1e-4)
    signatures = scores["signatures"]["en-de"]
    assert signatures["half"].startswith("nrefs:1|model:comet|sha256:")
    assert "|dtype:float16|unbabel-comet:2." in signatures["half"]
    assert signatures["kiwi"].startswith("nrefs:0|model:kiwi|sha256:")
