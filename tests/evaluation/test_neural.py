"""Neural metrics: what is refused before anything is scored, the cache of sentence scores, and the worker's failures.

The interpreter is a real one; unbabel-comet in it is a stand-in. `test_comet.py` has the package itself.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from support.neural import calls, metric_model, stand_in

from lander_ds.common.errors import ArtefactError, ConfigError, ModelError
from lander_ds.config.schema.neural import NeuralConfig
from lander_ds.evaluation import neural_scores as module
from lander_ds.evaluation.neural import PYTHON_VARIABLE, NeuralMetric
from lander_ds.evaluation.neural_scores import Segment, neural_scores

SEGMENTS = [Segment(f"source {n}", "x" * (n + 1), "y" * 4) for n in range(5)]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter."""
    return str(stand_in(tmp_path_factory.mktemp("stand-in") / "env"))


def metric_of(model: Path, python: str) -> NeuralMetric:
    return NeuralMetric.resolve("comet", NeuralConfig(str(model), python, batch_size=3))


def test_scores_come_from_the_worker_and_then_from_the_cache(
    python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A launcher's variables would have the worker wait for other ranks.
    for name in ("RANK", "SLURM_NTASKS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(module, "BATCH", 2)
    metric = metric_of(metric_model(tmp_path / "model"), python)
    scores = neural_scores(metric, [*SEGMENTS, SEGMENTS[0]], tmp_path / "cache")
    assert scores.of == {segment: len(segment.mt) / (len(segment.mt) + 4) for segment in SEGMENTS}
    fields = {"batch_size": 3, "gpus": 0, "fields": ["mt", "ref", "src"]}
    asked = [{"samples": count, **fields} for count in (2, 2, 1)]
    assert calls(tmp_path / "model") == [{"loaded": []}, *asked]

    more = [*SEGMENTS, Segment("new", "new", "new")]
    assert neural_scores(metric, more, tmp_path / "cache").of == {**scores.of, more[-1]: 0.5}
    assert calls(tmp_path / "model")[4:] == [{"loaded": []}, {"samples": 1, **fields}]

    # Nothing is started for what is known.
    assert neural_scores(replace(metric, python="/none"), more, tmp_path / "cache").of[more[-1]] == 0.5


@pytest.mark.parametrize(
    ("identifier", "hparams"),
    [
        ("referenceless_regression_metric", {}),
        ("unified_metric", {"input_segments": ["mt", "src"]}),
    ],
)
def test_quality_estimation_reads_no_reference(
    python: str, tmp_path: Path, identifier: str, hparams: dict[str, Any]
) -> None:
    metric = metric_of(metric_model(tmp_path / "model", identifier, **hparams), python)
    scores = neural_scores(metric, [SEGMENTS[0], SEGMENTS[0]._replace(ref="other")], tmp_path)
    assert list(scores.of.values()) == [1 / (1 + 8)] * 2
    assert [call.get("samples") for call in calls(tmp_path / "model")] == [None, 1]
    assert scores.signature.startswith("nrefs:0|model:model|sha256:")


def test_what_another_score_would_come_from_is_another_identity(python: str, tmp_path: Path) -> None:
    metric = metric_of(metric_model(tmp_path / "a"), python)
    assert metric.signature.endswith("|dtype:float32|unbabel-comet:9.9")
    assert metric.uses_references
    moved = metric_of(tmp_path / "a" / "checkpoints" / "model.ckpt", python)
    slower = replace(metric, config=replace(metric.config, batch_size=1, device="cpu"))
    assert metric.identity == moved.identity == slower.identity
    others = [
        metric_of(metric_model(tmp_path / "b", content="others"), python),
        metric_of(metric_model(tmp_path / "c", layer="mix"), python),
        replace(metric, config=replace(metric.config, dtype="float16")),
        replace(metric, version="9.10"),
    ]
    assert len({one.identity for one in (metric, *others)}) == 5


def test_what_is_scored_stays_when_the_worker_fails(
    python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH", 2)
    metric = metric_of(metric_model(tmp_path / "model"), python)
    bad = [*SEGMENTS[:2], Segment("a", "explode", "b")]
    with pytest.raises(
        ModelError,
        match=r"^score\.neural\.comet: .*could not score with .*model\.ckpt \(code 1; MemoryError: no room\): see "
        r".*worker\.log; where memory ran out, lower score\.neural\.comet\.batch_size",
    ):
        neural_scores(metric, bad, tmp_path / "cache")
    (log,) = tmp_path.glob("cache/neural-*/worker.log")
    assert "a library says something on standard output" in log.read_text()
    assert neural_scores(replace(metric, python="/none"), SEGMENTS[:2], tmp_path / "cache").of


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("damaged", r"\(code 1; RuntimeError: the weights are damaged\)"),
        ("nan", r"score\.neural\.comet: the score of 'x' is nan: use dtype: float32"),
    ],
)
def test_models_that_give_no_scores(python: str, tmp_path: Path, content: str, message: str) -> None:
    metric = metric_of(metric_model(tmp_path / "model", content=content), python)
    with pytest.raises(ModelError, match=message):
        neural_scores(metric, SEGMENTS, tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*/*.jsonl"))


def test_a_damaged_cache(python: str, tmp_path: Path) -> None:
    metric = metric_of(metric_model(tmp_path / "model"), python)
    neural_scores(metric, SEGMENTS, tmp_path)
    (file,) = tmp_path.glob("neural-*/*.jsonl")
    file.write_text(file.read_text() + '{"key": "a", "sc\n')
    with pytest.raises(ArtefactError, match=r"\.jsonl, line 6 is no sentence score: delete the file"):
        neural_scores(metric, SEGMENTS, tmp_path)


def test_the_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python: str) -> None:
    model = str(metric_model(tmp_path / "model"))
    monkeypatch.setenv(PYTHON_VARIABLE, python)
    assert NeuralMetric.resolve("comet", NeuralConfig(model)).python == python
    cure = r"make an environment .*name its bin/python in score\.neural\.comet\.python or LANDER_COMET_PYTHON"
    monkeypatch.setenv(PYTHON_VARIABLE, "/none/python")
    with pytest.raises(
        ConfigError, match=rf"^score\.neural\.comet\.python: /none/python cannot be run .*{cure}"
    ):
        NeuralMetric.resolve("comet", NeuralConfig(model))
    with pytest.raises(ConfigError, match=rf"has no unbabel-comet \(.*PackageNotFoundError.*{cure}"):
        NeuralMetric.resolve("comet", NeuralConfig(model, sys.executable))
    with pytest.raises(ConfigError, match=r"has no unbabel-comet \(it ended with code 1\)"):
        NeuralMetric.resolve("comet", NeuralConfig(model, "/bin/false"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("rm -r model", r"model: .*model does not exist; name a directory with hparams\.yaml"),
        ("rm model/checkpoints/model.ckpt", r"checkpoints has 0 checkpoints"),
        ("cp model/checkpoints/model.ckpt model/checkpoints/b.ckpt", r"checkpoints has 2 checkpoints"),
        ("rm model/hparams.yaml", r"is no COMET model, because .*hparams\.yaml is missing"),
        ("echo '{' > model/hparams.yaml", r"hparams\.yaml cannot be read"),
        ("echo '{}' > model/hparams.yaml", r"names no class_identifier and pretrained_model"),
        ("rm -r model/encoder", r"pretrained_model in .*hparams\.yaml names .*encoder, which does not exist"),
        ('sed -i \'s|"/[^"]*"|"xlm-r"|\' model/hparams.yaml', r"xlm-r: is no directory.*HF_HUB_OFFLINE"),
    ],
)
def test_the_model(
    python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: str, message: str
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model = metric_model(tmp_path / "model")
    subprocess.run(["bash", "-c", spoil], cwd=tmp_path, check=True)
    with pytest.raises(ModelError, match=message):
        metric_of(model, python)


def test_a_hub_id_comes_from_the_cache(python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--Unbabel--tiny"
    metric_model(repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    config = NeuralConfig("Unbabel/tiny", python)
    assert "|model:Unbabel/tiny|" in NeuralMetric.resolve("comet", config).signature
    missing = replace(config, model="Unbabel/other")
    with pytest.raises(
        ModelError, match=r"^Unbabel/other: .*correct score\.neural\.comet\.model, or run `hf download"
    ):
        NeuralMetric.resolve("comet", missing)
