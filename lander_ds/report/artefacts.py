"""What a run has written so far, loaded for the report; what is not there yet is named, with its stage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from lander_ds.common.errors import ArtefactError
from lander_ds.common.files import read_json
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.data_consistency import translated_pairs
from lander_ds.config.recipe import Recipe
from lander_ds.config.schema.types import System
from lander_ds.data.prepared import STATISTICS, replay_directory
from lander_ds.data.sources.corpus import TEXT
from lander_ds.inference.translations import Translation, read_translations
from lander_ds.method.awareness import Awareness
from lander_ds.method.selection import Selection


@dataclass(frozen=True)
class Missing:
    """An artefact that the report would have shown."""

    what: str
    """What a reader misses."""
    stage: str
    """The stage that makes it."""


@dataclass(frozen=True)
class Artefacts:
    """Everything the report shows. None or empty where a stage has not run."""

    statistics: dict[str, Any] | None
    """Pair -> split -> counts of the prepared data."""
    awareness: Awareness | None
    """What detect measured."""
    selection: Selection | None
    """Layers and banks."""
    steps: tuple[dict[str, Any], ...]
    """Lines of metrics.jsonl that describe a training step, by ascending step."""
    validations: tuple[dict[str, Any], ...]
    """Lines of metrics.jsonl that describe a validation."""
    training: dict[str, Any] | None
    """training.json."""
    scores: dict[str, Any] | None
    """scores.json."""
    translations: dict[str, dict[str, list[Translation]]]
    """Pair -> system -> translations."""
    missing: tuple[Missing, ...]
    """What is not there."""


def data_statistics(run: RunDirectory, recipe: Recipe) -> dict[str, Any] | None:
    """Pair -> split -> counts of the prepared data, the texts of `data.replay` as `replay`; None before prepare has run.

    Raises:
        ArtefactError: a file is damaged.
    """
    statistics = _json(run.data / STATISTICS, "prepare")
    texts = _json(replay_directory(run) / STATISTICS, "prepare") if recipe.data.replay.corpora else None
    if statistics is None or texts is None:
        return statistics
    return statistics | {"replay": texts[TEXT]}


def load_artefacts(run: RunDirectory, recipe: Recipe) -> Artefacts:
    """Load what there is.

    Raises:
        ArtefactError: something is there but damaged.
    """
    statistics = data_statistics(run, recipe)
    translations = _translations(run, translated_pairs(recipe))
    steps, validations = _metrics(run.metrics)
    expected = (
        ("the data statistics", "prepare", statistics is not None),
        ("relevance of the layers, awareness and overlap of the pairs", "detect", run.awareness.exists()),
        ("selected layers and banks", "select", run.selection.exists()),
        ("losses, learning rates and gates", "train", bool(steps)),
        ("the figures of the training", "train", run.training_summary.exists()),
        ("example translations", "translate", bool(translations)),
        ("scores", "score", run.scores.exists()),
    )
    return Artefacts(
        statistics=statistics,
        awareness=Awareness.load(run.awareness) if run.awareness.exists() else None,
        selection=Selection.load(run.selection) if run.selection.exists() else None,
        steps=steps,
        validations=validations,
        training=_json(run.training_summary, "train"),
        scores=_json(run.scores, "score"),
        translations=translations,
        missing=tuple(Missing(what, stage) for what, stage, present in expected if not present),
    )


def _json(path: Path, stage: str) -> dict[str, Any] | None:
    if not path.exists():
        return None
    value: dict[str, Any] = read_json(path, f"run stage {stage} again")
    return value


def _metrics(path: Path) -> tuple[tuple[dict[str, Any], ...], tuple[dict[str, Any], ...]]:
    if not path.exists():
        return (), ()
    steps: dict[int, dict[str, Any]] = {}
    validations: dict[int, dict[str, Any]] = {}
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            # A resumed training repeats the steps after its checkpoint: the later line counts.
            (validations if "valid_loss" in record else steps)[int(record["step"])] = record
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break  # training is writing this line, or a crash cut it short
            raise ArtefactError(
                f"{path}, line {number} is not a metrics record: run stage train again"
            ) from None
    ordered = (tuple(records[step] for step in sorted(records)) for records in (steps, validations))
    return next(ordered), next(ordered)


def _translations(run: RunDirectory, pairs: Sequence[str]) -> dict[str, dict[str, list[Translation]]]:
    by_pair: dict[str, dict[str, list[Translation]]] = {}
    for pair in pairs:
        paths = {system: run.translations / system / f"{pair}.jsonl" for system in get_args(System)}
        of_pair = {system: read_translations(path) for system, path in paths.items() if path.exists()}
        if of_pair:
            by_pair[pair] = of_pair
    return by_pair
