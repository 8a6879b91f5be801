"""What an experiment's file says, and the cells it becomes."""

from __future__ import annotations

from pathlib import Path

import pytest

from lander_ds.common.errors import ConfigError
from lander_ds.experiment.grid import Cell, Experiment, cells, load_experiment, overrides, trials

ROOT = Path(__file__).parents[2]

TEXT = """\
recipe: recipes/demo.yaml
run_dir: runs/x
baseline: lora
seeds: [1, 2]
equal_time: true
tuning: {steps: 5}
methods:
  base: {trained: false}
  lora: {set: {train.method: lora}, rate_keys: [train.lr.lora], rates: [1.0e-3, 3.0e-3]}
  full: {set: {train.method: full}, rate_keys: [train.lr.dense], rates: [1.0e-5, 3.0e-5]}
  control: {rate_keys: [train.lr.dense], tuned_as: full, equal_time: false}
"""


def read(directory: Path, text: str = TEXT) -> Experiment:
    path = directory / "x.yaml"
    path.write_text(text, encoding="utf-8")
    return load_experiment(path)


def test_every_method_is_tried_with_each_of_its_rates(tmp_path: Path) -> None:
    tried = [(cell.method, cell.rate, cell.steps) for cell in trials(read(tmp_path))]
    assert tried == [("lora", 1e-3, 5), ("lora", 3e-3, 5), ("full", 1e-5, 5), ("full", 3e-5, 5)]


def test_cells_come_seed_by_seed_and_the_base_once(tmp_path: Path) -> None:
    experiment = read(tmp_path)
    steps = [(cell.method, cell.seed) for cell in cells(experiment, "steps", {("full", "all"): 3e-5})]
    assert steps == [(name, 1) for name in ("base", "lora", "full", "control")] + [
        (name, 2) for name in ("lora", "full", "control")
    ]
    assert [cell.rate for cell in cells(experiment, "steps", {("full", "all"): 3e-5})][2] == 3e-5
    # At equal time: neither the base, nor the baseline, whose time it is, nor who does not want it.
    assert [(cell.method, cell.seed) for cell in cells(experiment, "time", {})] == [("full", 1), ("full", 2)]


def test_overrides_of_a_cell(tmp_path: Path) -> None:
    experiment = read(tmp_path)
    cell = Cell("steps", "full", "all", 2, 3e-5, None)
    settings = overrides(experiment, cell, tmp_path / "cell", tmp_path / "cache")
    assert 'train.method="full"' in settings
    assert "train.lr.dense=3e-05" in settings
    assert "seed=2" in settings
    assert "data.seed=1" in settings
    assert not any(setting.startswith("train.steps") for setting in settings)
    trial = overrides(experiment, trials(experiment)[0], tmp_path / "cell", tmp_path / "cache")
    assert {"train.steps=5", 'translate.split="valid"', "seed=0"} <= set(trial)


def test_variants_each_have_their_cells(tmp_path: Path) -> None:
    text = TEXT + "variants: {small: {data.corpora.0.limit: 10}, large: {}}\n"
    experiment = read(tmp_path, text)
    found = cells(experiment, "steps", {})
    assert [cell.variant for cell in found[:8]] == ["small"] * 4 + ["large"] * 4
    assert len({cell.name for cell in found}) == len(found)
    settings = overrides(experiment, found[0], tmp_path, tmp_path)
    assert "data.corpora.0.limit=10" in settings


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("baseline: lora", "baseline: lroa", "line 3: baseline: there is no method lroa; did you mean lora?"),
        ("seeds: [1, 2]", "seeds: [1, 1]", "line 4: seeds: needs at least one seed, and every seed once"),
        ("rates: [1.0e-3, 3.0e-3]", "rates: [1.0e-3]", "methods have 1 and 2 rates to try"),
        ("tuning: {steps: 5}", "", "rates: are only tried with tuning"),
        ("tuned_as: full", "tuned_as: base", "base is no method with rates of its own"),
        ("rate_keys: [train.lr.lora], ", "", "rates and rate_keys belong together"),
        ("  full:", "  fu/ll:", "a method's name becomes a directory"),
        ("equal_time: true", "equal_tmie: true", "did you mean equal_time"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_line(
    tmp_path: Path, before: str, after: str, message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        read(tmp_path, TEXT.replace(before, after))
    assert message in str(error.value)
    assert "x.yaml" in str(error.value)


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_experiments_of_the_repository_are_sound(path: Path) -> None:
    load_experiment(path)
