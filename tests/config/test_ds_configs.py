"""Every JSON under ds_configs: explained, accepted, its batches add up, and models train under it.

The models have the family of the real ones, a few layers and little width (`support.narrow_models`).
"""

from __future__ import annotations

import json
import math
import re
import runpy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.cpu_adam import COMPILE_SECONDS, compile_cpu_adam
from support.narrow_models import ARITHMETIC, CONFIGS, DATA_RANKS, make_narrow
from support.tiny_run import TinyRun
from support.worlds import Job, run_world

from lander_ds.config.deepspeed_json import check_deepspeed_json
from lander_ds.config.loading import load_recipe, read_recipe
from lander_ds.preflight.recipe import check_recipe

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "ds_configs"
SIZES = ("270m", "560m", "1b", "7b", "13b", "70b", "176b")
KINDS = ("replicated", "zero3", "zero3_offload", "pipeline", "pipeline_zero3")
JSONS = sorted(FOLDER.rglob("*.json"))
README = (FOLDER / "README.md").read_text(encoding="utf-8")
TRAIN = "support.narrow_models:train_narrow"


WHOLE = "270m"
"""The size whose every JSON trains. Those of one topology differ between sizes in numbers alone, so of the others only that
of the recipe does."""


def is_trained(path: Path) -> bool:
    size = path.parent.name
    return size == WHOLE or load_recipe(ROOT / "recipes" / f"{size}.yaml").deepspeed.endswith(
        name_of(path) + ".json"
    )


def topology(path: Path) -> str:
    return path.stem.removesuffix("_offload")


def overrides_of(kind: str) -> list[str]:
    """What a recipe says of a topology."""
    return [f"topology={kind}", f"pipeline_stages={2 if kind.startswith('pipeline') else 1}"]


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values that are no sections."""
    if not isinstance(value, dict):
        yield path, value
        return
    for key, item in value.items():
        yield from leaves(item, f"{path}.{key}" if path else key)


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


every_json = pytest.mark.parametrize("path", JSONS, ids=name_of)


def test_every_size_has_its_files() -> None:
    assert {path.parent.name for path in JSONS} == set(SIZES) == set(CONFIGS)
    for size in SIZES:
        names = {path.stem for path in JSONS if path.parent.name == size}
        assert {"zero3", "pipeline"} <= names <= set(KINDS)
        (row,) = re.findall(rf"^\| {size} \(.*", README, re.MULTILINE)
        wording = [cell.strip().startswith("yes") for cell in row.split("|")[2:-1]]
        assert {name for name, there in zip(KINDS, wording, strict=True) if there} == names, size


def test_the_files_are_what_the_command_writes() -> None:
    written = {f"{path.parent.name}/{path.name}": path.read_text(encoding="utf-8") for path in JSONS}
    assert written == runpy.run_path(str(FOLDER / "generate.py"))["files"](), "python ds_configs/generate.py"


@every_json
def test_the_readme_gives_a_reason_for_every_value(path: Path) -> None:
    (sizes,) = re.findall(rf"^\| {path.parent.name} \| .*", README, re.MULTILINE)
    for key, value in leaves(json.loads(path.read_text())):
        (row,) = re.findall(rf"^\| `{re.escape(key)}` .*", README, re.MULTILINE)
        wording = row + sizes if "per size" in row or "stage3_max_live_parameters" in row else row
        shown = {json.dumps(value), f"{value:,}"} if isinstance(value, int) else {json.dumps(value)}
        assert any(text in wording for text in shown), (key, value)


@every_json
def test_recipe_and_json_of_a_size_agree(path: Path) -> None:
    size, kind = path.parent.name, topology(path)
    stages = overrides_of(kind)
    # Paths of the corpora count from the repository.
    samples = [f"data.corpora.{i}.path={ROOT}/examples/sample/{split}.{{pair}}.jsonl" for i, split in SPLITS]
    recipe, document = read_recipe(
        ROOT / "recipes" / f"{size}.yaml", [f"deepspeed={path}", *stages, *samples]
    )
    check_recipe(recipe, None, document)
    check_deepspeed_json(recipe)


SPLITS = tuple(enumerate(("train", "valid", "test")))


@pytest.mark.parametrize("size", SIZES)
def test_a_recipe_names_a_json_of_its_size(size: str) -> None:
    recipe = load_recipe(ROOT / "recipes" / f"{size}.yaml")
    assert recipe.deepspeed == f"ds_configs/{size}/{recipe.topology}.json"
    assert (ROOT / recipe.deepspeed).exists()
    assert recipe.run_dir == f"runs/{size}"
    sharded = size in ("70b", "176b")
    assert recipe.translate.weights == ("sharded" if sharded else "replicated")
    assert recipe.train.activation_checkpointing is sharded


@pytest.fixture(scope="module")
def trained(tiny_run: TinyRun) -> TinyRun:
    """JSONs have trained a narrow model of their size for two steps on two ranks."""
    offload_works = shutil.which("c++") is not None
    if offload_works:
        compile_cpu_adam()
    for size in SIZES:
        make_narrow(tiny_run, size)
    jobs = []
    # zero3 first: DeepSpeed numbers modules by process, and after a pipeline the ranks' numbers differ.
    for path in sorted(filter(is_trained, JSONS), key=lambda path: (topology(path) != "zero3", path)):
        if "offload" in path.stem and not offload_works:
            continue
        size, kind = path.parent.name, topology(path)
        stages = overrides_of(kind)
        common = (f"model.path=$root/{size}", f"deepspeed={path}", "model.dtype=bfloat16")
        short = ("train.steps=2", "train.batch_tokens=192", "train.valid_examples=1")
        jobs.append(Job(f"{size}-{path.stem}", (*common, *short, *stages), TRAIN))
    run_world(tiny_run.root, 2, jobs)
    return tiny_run


@pytest.mark.distributed
@pytest.mark.timeout(COMPILE_SECONDS + 300)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_a_narrow_model_trains(trained: TinyRun, size: str, name: str) -> None:
    if not (FOLDER / size / f"{name}.json").exists():
        pytest.skip("there is no such JSON for this size; ds_configs/README.md says why")
    if not is_trained(FOLDER / size / f"{name}.json"):
        pytest.skip("this size trains in the topology of its recipe alone")
    run = trained.run(f"{size}-{name}-2")
    if not run.training_summary.exists():
        pytest.skip("DeepSpeed compiles its CPU Adam with a C++ compiler, and there is none")
    actual = json.loads(run.training_summary.read_text())
    assert actual["steps"] == 2
    assert actual["frozen_unchanged"] is True
    assert actual["topology"] == name.removesuffix("_offload")
    records = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 2
    assert all(0.0 < loss < 20.0 for loss in losses)
    depth = CONFIGS[size]().num_hidden_layers
    spans = actual["layers_per_rank"]
    assert [spans[0][0], spans[-1][1]] == [0, depth]
    whole = 2 * actual["total_parameters"]
    if name == "replicated":
        assert actual["weight_bytes_per_rank"] == pytest.approx([whole] * 2, rel=0.01)
        return
    assert max(actual["weight_bytes_per_rank"]) < 0.95 * whole
    assert sum(actual["weight_bytes_per_rank"]) < 1.05 * whole, "nothing is held twice but a tied head"


@pytest.mark.distributed
@pytest.mark.timeout(COMPILE_SECONDS + 300)
@pytest.mark.parametrize("size", SIZES)
def test_batches_add_up_in_every_world(trained: TinyRun, size: str) -> None:
    capacity, budget = 96, 192
    for path in JSONS:
        file = trained.root / f"{size}-{path.stem}-2" / ARITHMETIC
        if path.parent.name != size or not file.exists():
            continue
        worlds = json.loads(file.read_text())
        assert [world["ranks"] for world in worlds] == list(DATA_RANKS)
        for world in worlds:
            assert world["world_size"] == world["ranks"]
            assert world["accumulated"] == max(1, math.ceil(budget / (capacity * world["ranks"])))
            assert world["global"] == world["micro"] * world["accumulated"] * world["ranks"]
            assert world["stage"] == json.loads(path.read_text())["zero_optimization"]["stage"]
