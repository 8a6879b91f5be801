"""What version 0.1.0 computed, and the files that it wrote: the same figures again, and the files still read.

`tests/fixtures/golden` holds a base, corpora, a recipe and the run that 0.1.0 made of them, with two threads. Until banks
were joined for one product all was equal to the bit with two threads; since then sums over banks are sums over neurons
(losses differ by 2e-8, weights by 2e-6). Tolerances are a few times that, and what one thread changes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.commands import lander
from support.compare import assert_same_statistics

from lander_ds.checkpoint.checkpoint import DIGEST, STATE
from lander_ds.common.files import json_hash
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.loading import load_recipe
from lander_ds.data.prepared import PreparedData
from lander_ds.method.awareness import Awareness
from lander_ds.method.selection import Selection

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
THEN = GOLDEN / "run"
SYSTEMS = ("base", "fewshot", "trained")
TIMES = {"seconds", "processor_seconds", "eta_seconds", "tokens_per_second"}


def run_stage(directory: Path, stage: str, *arguments: str) -> None:
    """A stage of the golden recipe."""
    lander(stage, "--recipe", "recipe.yaml", *arguments, directory=directory, seconds=500.0)


@pytest.fixture(scope="module")
def now(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The run directory of every stage run again; paths in the recipe are relative."""
    directory = tmp_path_factory.mktemp("golden")
    shutil.copytree(GOLDEN, directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns("run"))
    run_stage(directory, "all")
    yield directory / "run"
    shutil.rmtree(directory)


def records(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the machine's speed."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def assert_close(actual: Any, wanted: Any, tolerance: float, path: str = "") -> None:
    """Nested figures alike; what is new in `found` is no fault."""
    if isinstance(wanted, dict):
        for key, value in wanted.items():
            assert key in actual, f"{path}/{key}"
            assert_close(actual[key], value, tolerance, f"{path}/{key}")
    elif isinstance(wanted, list):
        assert len(actual) == len(wanted), path
        for index, value in enumerate(wanted):
            assert_close(actual[index], value, tolerance, f"{path}/{index}")
    elif isinstance(wanted, float):
        assert actual == pytest.approx(wanted, rel=tolerance, abs=tolerance), path
    else:
        assert actual == wanted, path


def test_losses_are_what_they_were(now: Path) -> None:
    assert_close(records(now), records(THEN), 1e-6)


def test_awareness_is_what_it_was(now: Path) -> None:
    actual, wanted = (Awareness.load(run / "awareness.safetensors") for run in (now, THEN))
    assert actual.pairs == wanted.pairs
    assert torch.equal(actual.tokens, wanted.tokens)
    assert_same_statistics(actual, wanted, 3e-6)


def test_the_selection_is_what_it_was(now: Path) -> None:
    actual, wanted = (Selection.load(run / "selection.safetensors") for run in (now, THEN))
    assert actual.pairs == wanted.pairs
    assert [layer.layer for layer in actual.layers] == [layer.layer for layer in wanted.layers]
    for one, other in zip(actual.layers, wanted.layers, strict=True):
        assert one.banks == other.banks
        assert torch.equal(one.permutation, other.permutation)


def test_checkpoints_hold_what_they_held(now: Path) -> None:
    for name in ("trained-0", "optimizer-0"):
        actual, wanted = (load_file(run / f"checkpoints/step-4/{name}.safetensors") for run in (now, THEN))
        assert actual.keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(actual[key], value, rtol=1e-6, atol=5e-6, msg=key)


@pytest.mark.parametrize("system", SYSTEMS)
def test_translations_are_what_they_were(now: Path, system: str) -> None:
    for path in sorted((THEN / "translations" / system).iterdir()):
        actual, wanted = (
            [
                json.loads(line)["hyp"]
                for line in (run / "translations" / system / path.name).open(encoding="utf-8")
            ]
            for run in (now, THEN)
        )
        assert actual == wanted, path.name


def test_scores_are_what_they_were(now: Path) -> None:
    actual, wanted = (
        json.loads((run / "scores.json").read_text(encoding="utf-8"))["pairs"] for run in (now, THEN)
    )
    assert_close(actual, wanted, 1e-9)


def adopt_new_data_hash(directory: Path) -> None:
    """Prepared data has another format, and so another hash, since; its tokens are the same, as the losses show."""
    recipe = load_recipe(directory / "recipe.yaml", [f"run_dir={directory / 'run'}"])
    path = directory / "run" / "checkpoints" / "step-4" / STATE
    state = json.loads(path.read_text(encoding="utf-8"))
    del state[DIGEST]
    state["data_hash"] = PreparedData.load(RunDirectory(directory / "run"), recipe).content_hash(
        "train", "valid"
    )
    path.write_text(json.dumps({**state, DIGEST: json_hash(state)}), encoding="utf-8")


def test_old_files_are_read(tmp_path: Path) -> None:
    """Awareness gives the old selection; training goes on from the old checkpoint; the old delta fits its base."""
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
    run = tmp_path / "run"
    shutil.copy(run / "selection.safetensors", tmp_path / "old.safetensors")
    run_stage(tmp_path, "prepare")
    run_stage(tmp_path, "select", "--force")
    actual, wanted = (
        Selection.load(run / "selection.safetensors"),
        Selection.load(tmp_path / "old.safetensors"),
    )
    assert actual.metadata["criteria"] == wanted.metadata["criteria"]
    for one, other in zip(actual.layers, wanted.layers, strict=True):
        assert one.banks == other.banks
        assert torch.equal(one.permutation, other.permutation)
    # The checkpoint belongs to the very file.
    shutil.copy(tmp_path / "old.safetensors", run / "selection.safetensors")
    adopt_new_data_hash(tmp_path)
    run_stage(tmp_path, "train", "--auto-resume")
    assert_close(records(run), records(THEN), 1e-6)
    lander("delta", "apply", "base", "run/export/delta", "applied", directory=tmp_path)
    assert (tmp_path / "applied" / "routed_ffn.py").is_file()
