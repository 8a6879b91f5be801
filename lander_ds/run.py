"""The run directory: where artefacts lie, which stage wrote them from what, and whether a stage is up to date.

Every stage leaves `stages/<stage>.json`: the resolved options it depends on, package versions, and the hashes of
the files it read and wrote. A stage is up to date when options, inputs and outputs all still match.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lander_ds.config.recipe import Recipe
from lander_ds.directories import inside
from lander_ds.errors import ArtefactError
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


def file_hash(path: Path) -> str:
    """SHA-256 of a file, or of the sorted relative names and contents of a directory's files (hex)."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            if path.is_dir():
                digest.update(str(file.relative_to(path)).encode() + b"\0")
            with file.open("rb") as stream:
                while block := stream.read(1 << 22):
                    digest.update(block)
    return digest.hexdigest()


def json_hash(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form (hex)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON so that the file is either the old one or the whole new one."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` to a temporary name, flush it to disk and rename it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def read_json(path: Path, cure: str) -> Any:
    """Parse a JSON artefact.

    Raises:
        ArtefactError: the file is missing or damaged; the message ends with `cure`.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtefactError(f"{path} does not exist: {cure}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtefactError(f"{path} is not valid JSON ({error}): {cure}") from None


def versions() -> dict[str, str]:
    """Versions of this package, Python and the libraries that shape results."""
    found = {"lander_ds": __version__, "python": platform.python_version()}
    for name in RECORDED_PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


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
        self.report = self.path / "report.html"
        self.data = self.path / "data"
        self.recipe = self.path / "recipe.resolved.yaml"

    def record_path(self, stage: str) -> Path:
        """Where the record of `stage` lies."""
        return self.path / "stages" / f"{stage}.json"

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
            found = (record["options_hash"], dict(record["inputs"]), record["versions"]["lander_ds"])
            digests = dict(record["outputs"])
        except (KeyError, TypeError, ValueError):
            raise ArtefactError(f"{path} is no stage record: {cure}") from None
        outputs = {inside(self.path, name, path): digest for name, digest in digests.items()}
        if found != (json_hash(options), dict(inputs), __version__):
            return False
        return all(output.exists() and file_hash(output) == digest for output, digest in outputs.items())

    def read_record(self, stage: str) -> dict[str, Any]:
        """The record of a finished stage.

        Raises:
            ArtefactError: the stage has not run in this directory.
        """
        record: dict[str, Any] = read_json(self.record_path(stage), f"run stage {stage} first")
        return record


def section(recipe: Recipe, *names: str) -> dict[str, Any]:
    """The named top-level parts of a recipe as JSON values, for `RunDirectory.record`."""
    everything = asdict(recipe)
    return json.loads(json.dumps({name: everything[name] for name in names}))  # type: ignore[no-any-return]
