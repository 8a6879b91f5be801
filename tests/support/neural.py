"""Neural metrics without unbabel-comet: a real interpreter whose package of that name is a stand-in, and scored runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.recipe import ModelConfig, Recipe
from lander_ds.config.schema.data import DataConfig
from lander_ds.config.schema.neural import NeuralConfig
from lander_ds.config.schema.results import ScoreConfig, TranslateConfig
from lander_ds.inference.translations import Translation, write_translations

SAMPLE = Path(__file__).parents[2] / "examples" / "sample"

_STAND_IN = """
import json, os, types
from pathlib import Path

print("a library says something on standard output")

def load_from_checkpoint(path):
    log = Path(path).with_name("calls.jsonl")
    launched = sorted(name for name in os.environ if name.startswith(("RANK", "SLURM_")))
    def say(**what):
        with log.open("a") as stream:
            stream.write(json.dumps(what) + "\\n")
    say(loaded=launched)
    content = Path(path).read_text()
    if content == "damaged":
        raise RuntimeError("the weights are damaged")
    class Model:
        def half(self):
            say(half=True)
        def predict(self, samples, batch_size, gpus, progress_bar):
            say(samples=len(samples), batch_size=batch_size, gpus=gpus, fields=sorted(samples[0]))
            if any("explode" in sample["mt"] for sample in samples):
                raise MemoryError("no room")
            scores = [len(s["mt"]) / (len(s["mt"]) + len(s.get("ref", s["src"]))) for s in samples]
            return types.SimpleNamespace(scores=[float("nan") if content == "nan" else s for s in scores])
    return Model()
"""


def stand_in(directory: Path) -> Path:
    """An interpreter that has `comet`, version 9.9: a segment scores len(mt) / (len(mt) + len(ref or src)); a checkpoint
    `damaged` does not load, one with `nan` gives nan, and a translation with `explode` ends the process."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory], check=True, timeout=120)
    (site,) = directory.glob("lib/python*/site-packages")
    (site / "comet.py").write_text(_STAND_IN, encoding="utf-8")
    (site / "torch.py").write_text("class cuda:\n    is_available = staticmethod(lambda: False)\n")
    (site / "unbabel_comet-9.9.dist-info").mkdir()
    (site / "unbabel_comet-9.9.dist-info" / "METADATA").write_text("Name: unbabel-comet\nVersion: 9.9\n")
    return directory / "bin" / "python"


def metric_model(
    directory: Path, identifier: str = "regression_metric", content: str = "weights", **hparams: object
) -> Path:
    """A model for the stand-in."""
    (directory / "checkpoints").mkdir(parents=True)
    (directory / "encoder").mkdir()
    (directory / "checkpoints" / "model.ckpt").write_text(content)
    values = {
        "class_identifier": identifier,
        "pretrained_model": str(directory / "encoder"),
        **hparams,
    }
    (directory / "hparams.yaml").write_text(json.dumps(values))
    return directory


def calls(model: Path) -> list[dict[str, object]]:
    """What the stand-in has been asked, in order."""
    log = model / "checkpoints" / "calls.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def translated_run(
    directory: Path, metrics: Mapping[str, NeuralConfig], pairs: tuple[str, ...] = ("en-de",), count: int = 12
) -> tuple[Recipe, RunDirectory]:
    """A run with translations of three systems, worse to better, and a recipe that scores them."""
    recipe = Recipe(
        str(directory),
        ModelConfig("model"),
        DataConfig(pairs, ()),
        "none",
        translate=TranslateConfig(("base", "fewshot", "trained")),
        score=ScoreConfig(bootstrap_samples=50, neural=dict(metrics)),
    )
    run = RunDirectory(directory)
    for pair in pairs:
        lines = (SAMPLE / f"test.{pair}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        rows = [json.loads(line) for line in lines]
        for system, share in (("base", 0.3), ("fewshot", 0.5), ("trained", 0.8)):
            translations = [
                Translation(
                    f"{pair}:test:{number}",
                    row["src"],
                    row["tgt"],
                    row["tgt"][: max(1, int(share * len(row["tgt"])) - number % 3)].strip(),
                    5,
                )
                for number, row in enumerate(rows)
            ]
            write_translations(run.translations / system / f"{pair}.jsonl", translations)
    return recipe, run
