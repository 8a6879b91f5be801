"""What remains of a finished cell: its figures and its translations, among the results of the experiment.

    cells/CELL.json           figures
    hypotheses/CELL.jsonl.xz  JSON lines: system, pair, id, hyp (not of trials)
    references.VARIANT.jsonl.xz   JSON lines: pair, id, src, ref

`pair` is `SET:PAIR` for a direction of a named test set (`evaluate.sets`).
A cell whose figures are there is finished, on whatever machine it ran; its run directory is no longer needed.
"""

from __future__ import annotations

import json
import lzma
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from lander_ds.common.files import read_json, write_json, writing
from lander_ds.common.run_directory import RunDirectory
from lander_ds.evaluation.score import BASE, FEWSHOT, TRAINED, TRAINED_FEWSHOT
from lander_ds.experiment.grid import Cell
from lander_ds.inference.translations import read_translations
from lander_ds.report.sets import systems_of

CURE = "delete it, so that the cell is run again"
EXAMPLES = ", few-shot"
"""Behind the name of a method whose prompts show examples."""
METRICS = ("bleu", "chrf", "chrfpp", "off_target")
WARM_UP = 2
"""First steps of a run, in which buffers are made and orders recorded; not timed."""

Figures = dict[str, Any]
"""Content of a cell's file."""


def cell_file(out: Path, cell: Cell) -> Path:
    """Where the figures of a cell stand among the results."""
    return out / "cells" / f"{cell.name.replace('/', '.')}.json"


def method_name(system: str, method: str) -> str:
    """How a system of a method's cell is called in results: those of the untouched base are the same in all cells."""
    names = {BASE: BASE, FEWSHOT: BASE + EXAMPLES, TRAINED_FEWSHOT: method + EXAMPLES}
    return names.get(system, method)


def publish(cell: Cell, directory: Path, out: Path, seconds: float) -> None:
    """Write what remains of a cell.

    Args:
        cell: with the learning rate and the steps that it had.
        directory: its run directory.
        out: the results.
        seconds: of wall time that its run has taken, translating and scoring included.
    """
    run = RunDirectory(directory)
    scores = read_json(run.scores, "run stage score again")
    training = read_json(run.training_summary, "train again") if run.training_summary.exists() else {}
    metrics = (*METRICS, *scores.get("neural", ()))
    if cell.kind != "trial":
        _publish_texts(cell, run, scores, out)
    # Last: it says that the cell is finished.
    write_json(
        cell_file(out, cell),
        {
            "kind": cell.kind,
            "method": cell.method,
            "variant": cell.variant,
            "seed": cell.seed,
            "rate": cell.rate,
            "steps": training.get("steps"),
            "date": time.strftime("%Y-%m-%d"),
            "seconds": round(seconds, 1),
            "training_seconds": training.get("seconds"),
            "step_seconds": _step_seconds(run.metrics),
            "trained_parameters": training.get("trained_parameters"),
            "optimizer_bytes": sum(training.get("optimizer_bytes_per_rank", [])) or None,
            "peak_memory": max(training.get("peak_memory_bytes_per_rank", [0])) or None,
            "signatures": scores["signatures"],
            "systems": {system: _scores(scores["pairs"], system, metrics) for system in scores["systems"]},
            "sets": {
                name: {
                    "systems": {
                        system: _scores(one["directions"], system, metrics)
                        for system in systems_of({name: one})
                    },
                    "bits_per_byte": {
                        language: {system: loss["bits_per_byte"] for system, loss in of_language.items()}
                        for language, of_language in one["monolingual"].items()
                    },
                }
                for name, one in scores.get("sets", {}).items()
            },
        },
    )


def _scores(
    entries: Mapping[str, Any], system: str, metrics: Iterable[str]
) -> dict[str, dict[str, float | None]]:
    """Direction -> metric -> score of a system, of the directions that it has translated."""
    return {
        pair: {metric: entry["systems"][system].get(metric) for metric in metrics}
        for pair, entry in entries.items()
        if system in entry["systems"]
    }


def _step_seconds(metrics: Path) -> dict[str, float]:
    """Median step by either clock; processor time is that of all ranks."""
    if not metrics.exists():
        return {}
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    steps = [record for record in records if "seconds" in record][WARM_UP:]
    names = {"wall": "seconds", "processor": "processor_seconds"}
    return {clock: median(step[name] for step in steps) for clock, name in names.items() if steps}


def _publish_texts(cell: Cell, run: RunDirectory, scores: Mapping[str, Any], out: Path) -> None:
    rows: list[dict[str, str]] = []
    sources = references(out, cell.variant)
    of_sets = {name: systems_of({name: one}) for name, one in scores.get("sets", {}).items()}
    sets = {None: scores["systems"], **of_sets}
    for name, systems in sets.items():
        for system in systems:
            for file in sorted(run.translations_of(system, name).glob("*.jsonl")):
                pair = file.stem if name is None else f"{name}:{file.stem}"
                for item in read_translations(file):
                    rows.append({"system": system, "pair": pair, "id": item.id, "hyp": item.hyp})
                    sources[pair, item.id] = {"pair": pair, "id": item.id, "src": item.src, "ref": item.ref}
    _write_lines(_references_file(out, cell.variant), sources.values())
    _write_lines(out / "hypotheses" / f"{cell_file(out, cell).stem}.jsonl.xz", rows)


def _references_file(out: Path, variant: str) -> Path:
    return out / f"references.{variant}.jsonl.xz"


def references(out: Path, variant: str) -> dict[tuple[str, str], dict[str, str]]:
    """(pair, id) -> `pair`, `id`, `src` and `ref` of every sentence that a cell of a variant has translated."""
    path = _references_file(out, variant)
    return {(row["pair"], row["id"]): row for row in _read_lines(path)} if path.exists() else {}


def hypotheses(out: Path, figures: Figures) -> dict[str, dict[tuple[str, str], str]]:
    """System -> (pair, id) -> translation, of a cell that is no trial."""
    cell = Cell(**{name: figures[name] for name in ("kind", "method", "variant", "seed", "rate", "steps")})
    texts: dict[str, dict[tuple[str, str], str]] = {}
    for row in _read_lines(out / "hypotheses" / f"{cell_file(out, cell).stem}.jsonl.xz"):
        texts.setdefault(row["system"], {})[row["pair"], row["id"]] = row["hyp"]
    return texts


def published(out: Path) -> list[Figures]:
    """The figures of every finished cell, by name of its file.

    Raises:
        ArtefactError: a file is damaged.
    """
    return [read_json(path, CURE) for path in sorted((out / "cells").glob("*.json"))]


def mean_chrf(figures: Figures) -> float:
    """Mean chrF2 of the trained system over pairs."""
    scores = [score["chrf"] for score in figures["systems"][TRAINED].values()]
    return float(sum(scores) / len(scores))


def _write_lines(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with writing(path) as temporary:
        temporary.write_bytes(lzma.compress(text.encode()))


def _read_lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in lzma.decompress(path.read_bytes()).decode().splitlines()]
