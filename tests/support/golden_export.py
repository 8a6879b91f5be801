"""Stage export on the run that version 0.1.0 left in tests/fixtures/golden: a real training, in seconds."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lander_ds.common.files import read_json
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.loading import load_recipe
from lander_ds.config.recipe import Recipe
from lander_ds.stages import export, prepare

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"


@dataclass(frozen=True)
class GoldenRun:
    """A copy of the golden directory with prepared data."""

    root: Path

    @property
    def base(self) -> Path:
        """The base model."""
        return self.root / "base"

    @property
    def run(self) -> RunDirectory:
        """Its run directory."""
        return RunDirectory(self.root / "run")

    def recipe(self, *overrides: str) -> Recipe:
        """Its recipe, verified on one sentence per pair."""
        paths = (f"run_dir={self.root / 'run'}", f"model.path={self.base}", "export.verify=1")
        return load_recipe(self.root / "recipe.yaml", [*paths, *overrides])

    def export(self, *overrides: str, force: bool = False) -> dict[str, Any]:
        """Run stage export; returns verification.json."""
        export.run(self.recipe(*overrides), self.run, force)
        proof: dict[str, Any] = read_json(self.run.export / "verification.json", "")
        return proof


def golden_run(root: Path) -> GoldenRun:
    """Copy the golden directory to `root` and prepare its data."""
    shutil.copytree(GOLDEN, root)
    recipe = root / "recipe.yaml"
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("./", f"{root}/"), encoding="utf-8")
    golden = GoldenRun(root)
    prepare.run(golden.recipe(), golden.run)
    return golden
