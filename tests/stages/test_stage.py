"""How stages run: what is up to date is left alone, in order, and what a start needs is read once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from support.tiny_run import TinyRun
from support.workspace import Workspace

from lander_ds.common import lock
from lander_ds.common.errors import ArtefactError
from lander_ds.common.lock import locked
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.deepspeed_strict import read_deepspeed_json
from lander_ds.config.loading import load_recipe
from lander_ds.distributed.start import Start
from lander_ds.models.weights import base_fingerprint
from lander_ds.stages.stage import Part, Result, Stage


@dataclass
class Kitchen:
    """Parts that note what they did."""

    directory: Path
    did: list[str] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)

    def part(self, name: str, fails: bool = False, usable: bool = True, **options: Any) -> Part:
        def body() -> Result:
            self.did.append(name)
            if fails:
                raise ArtefactError(f"{name} is burnt")
            path = self.directory / name
            path.write_text(name)
            return Result([path], {"weight": 3})

        return Part(
            f"score.{name}", options, {"flour": "abc"}, body, lambda: usable, lambda: self.shown.append(name)
        )

    def run(self, recipe: Any, *parts: Part, force: bool = False) -> list[str]:
        self.did.clear()
        Stage("score", lambda start: parts).run(recipe, RunDirectory(self.directory), force)
        return list(self.did)


@pytest.fixture
def kitchen(tmp_path: Path) -> Kitchen:
    return Kitchen(tmp_path / "run")


@pytest.fixture
def recipe(workspace: Workspace, kitchen: Kitchen) -> Any:
    kitchen.directory.mkdir()
    return load_recipe(workspace.recipe, [f"run_dir={kitchen.directory}"])


def test_parts_run_in_order_and_once(kitchen: Kitchen, recipe: Any) -> None:
    parts = kitchen.part("bread"), kitchen.part("cake")
    assert kitchen.run(recipe, *parts) == ["bread", "cake"]
    assert kitchen.run(recipe, *parts) == []
    assert kitchen.run(recipe, *parts, force=True) == ["bread", "cake"]
    assert kitchen.shown == ["bread", "cake"] * 3
    record = RunDirectory(kitchen.directory).read_record("score.cake")
    assert record["weight"] == 3
    assert list(record["outputs"]) == ["cake"]


def test_a_part_runs_again_when_its_options_or_outputs_changed(kitchen: Kitchen, recipe: Any) -> None:
    parts = kitchen.part("bread"), kitchen.part("cake")
    kitchen.run(recipe, *parts)
    assert kitchen.run(recipe, parts[0], kitchen.part("cake", sugar=2)) == ["cake"]
    assert kitchen.run(recipe, kitchen.part("bread", usable=False), kitchen.part("cake", sugar=2)) == [
        "bread"
    ]
    (kitchen.directory / "bread").unlink()
    assert kitchen.run(recipe, *parts[:1]) == ["bread"]


def test_what_is_not_up_to_date_is_prepared_before_the_first_part_begins(
    kitchen: Kitchen, recipe: Any
) -> None:
    def part(name: str, **options: Any) -> Part:
        return replace(kitchen.part(name, **options), prepare=lambda: kitchen.did.append(f"dough of {name}"))

    assert kitchen.run(recipe, part("bread"), part("cake")) == [
        "dough of bread",
        "dough of cake",
        "bread",
        "cake",
    ]
    assert kitchen.run(recipe, part("bread"), part("cake", sugar=2)) == ["dough of cake", "cake"]


def test_a_part_that_fails_leaves_no_record_and_those_before_it_stay(kitchen: Kitchen, recipe: Any) -> None:
    bread, burnt, cake = kitchen.part("bread"), kitchen.part("toast", fails=True), kitchen.part("cake")
    with pytest.raises(ArtefactError, match="toast is burnt"):
        kitchen.run(recipe, bread, burnt, cake)
    assert kitchen.did == ["bread", "toast"]
    assert kitchen.run(recipe, bread, kitchen.part("toast"), cake) == ["toast", "cake"]


def test_a_stage_that_runs_already_is_not_begun_again(
    kitchen: Kitchen, recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.2)
    with locked(kitchen.directory / ".score.lock", "it"):
        with pytest.raises(ArtefactError, match=r"stage score in .*run is being worked on by process \d+ on"):
            kitchen.run(recipe, kitchen.part("bread"))
        assert kitchen.did == []
    assert kitchen.run(recipe, kitchen.part("bread")) == ["bread"]


def test_a_start_reads_its_files_once(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[str] = []
    monkeypatch.setattr(
        "lander_ds.config.deepspeed_json.read_deepspeed_json",
        lambda path: (counted.append("json"), read_deepspeed_json(path))[1],
    )
    monkeypatch.setattr(
        "lander_ds.distributed.start.base_fingerprint",
        lambda path: (counted.append("base"), base_fingerprint(path))[1],
    )
    recipe = tiny_run.recipe("started")
    start = Start(recipe, RunDirectory(recipe.run_dir))
    assert [start.deepspeed_config(1, count)["gradient_accumulation_steps"] for count in (1, 2)] == [1, 2]
    assert start.deepspeed == start.deepspeed
    assert start.base_fingerprint == start.base_fingerprint
    assert counted == ["json", "base"]
