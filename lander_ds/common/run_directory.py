"""The run directory: where artefacts lie, which stage wrote them from what, and whether a stage is up to date.

Every stage leaves `stages/<stage>.json`: the resolved options it depends on, package versions, and the hashes of
the files it read and wrote. A stage is up to date when options, inputs and outputs all still match.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lander_ds.common.errors import ArtefactError
from lander_ds.common.files import file_hash, inside, json_hash, read_json, write_json
from lander_ds.version import __version__

RECORDED_PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "datasets",
    "sentencepiece",
    "sacrebleu",
    "safetensors",
)


def versions() -> dict[str, str]:
    """Versions of this package, Python and the libraries that shape results."""
    numbers = {"lander_ds": __version__, "python": platform.python_version()}
    for name in RECORDED_PACKAGES:
        try:
            numbers[name] = version(name)
        except PackageNotFoundError:
            numbers[name] = "missing"
    return numbers


class RunDirectory:
    """Paths of a run's artefacts and the records of its stages."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.awareness = self.path / "awareness.safetensors"
        self.selection = self.path / "selection.safetensors"
        self.checkpoints = self.path / "checkpoints"
        self.export = self.path / "export"
        self.translations = self.path / "translations"
        self.scores = self.path / "scores.json"
        self.metrics = self.path / "metrics.jsonl"
        self.training_summary = self.path / "training.json"
        self.trackers = self.path / "trackers.json"
        self.report = self.path / "report.html"
        self.data = self.path / "data"
        self.recipe = self.path / "recipe.resolved.yaml"

    def record_path(self, stage: str) -> Path:
        """Where the record of `stage` lies."""
        return self.path / "stages" / f"{stage}.json"

    def cache(self, shared: str | None) -> Path:
        """Where entries named by content hash lie: in the cache that runs share (`data.cache_dir`), or here."""
        return Path(shared) if shared else self.path / "cache"

    def translations_of(self, system: str, test_set: str | None = None) -> Path:
        """Where the translations of a system lie, of the split that the recipe translates or of a named test set."""
        return (
            self.translations / system if test_set is None else self.translations / "sets" / test_set / system
        )

    def relative(self, path: Path) -> str:
        """`path` relative to the run directory where it lies inside, else as given."""
        return str(path.relative_to(self.path)) if path.is_relative_to(self.path) else str(path)

    def record(
        self,
        stage: str,
        options: Mapping[str, Any],
        inputs: Mapping[str, str],
        outputs: Sequence[Path],
        seconds: float,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the record of a finished stage.

        Args:
            stage: its name.
            options: everything in the recipe that its result depends on (JSON values).
            inputs: what it read, name -> content hash.
            outputs: files or directories it wrote.
            seconds: wall time.
            extra: figures worth keeping, e.g. counts.
        """
        write_json(
            self.record_path(stage),
            {
                "stage": stage,
                "options": dict(options),
                "options_hash": json_hash(options),
                "inputs": dict(inputs),
                "outputs": {self.relative(path): file_hash(path) for path in outputs},
                "versions": versions(),
                "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "seconds": round(seconds, 2),
                **(extra or {}),
            },
        )

    def up_to_date(self, stage: str, options: Mapping[str, Any], inputs: Mapping[str, str]) -> bool:
        """Whether `stage` already ran with these options and inputs and its outputs are unchanged.

        Raises:
            ArtefactError: its record is damaged, or names files outside the run directory.
        """
        path = self.record_path(stage)
        if not path.exists():
            return False
        cure = f"delete it to run stage {stage} again"
        record = read_json(path, cure)
        try:
            recorded = (record["options_hash"], dict(record["inputs"]), record["versions"]["lander_ds"])
            digests = dict(record["outputs"])
        except (KeyError, TypeError, ValueError):
            raise ArtefactError(f"{path} is no stage record: {cure}") from None
        outputs = {inside(self.path, name, path): digest for name, digest in digests.items()}
        if recorded != (json_hash(options), dict(inputs), __version__):
            return False
        return all(output.exists() and file_hash(output) == digest for output, digest in outputs.items())

    def read_record(self, stage: str) -> dict[str, Any]:
        """The record of a finished stage.

        Raises:
            ArtefactError: the stage has not run in this directory.
        """
        record: dict[str, Any] = read_json(self.record_path(stage), f"run stage {stage} first")
        return record
