#!/usr/bin/env python3
"""Write docs/evidence.md from the experiments' files and results: `experiments/evidence.py`."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detection_page import as_svg, facts, knock_out_figure, stability_figure
from jinja2 import Environment

from lander_ds.common.files import read_json
from lander_ds.experiment.grid import Experiment, load_experiment
from lander_ds.experiment.outcome import cell_file
from lander_ds.experiment.results import assemble
from lander_ds.experiment.runner import Runner
from lander_ds.experiment.table import as_markdown

ROOT = Path(__file__).parents[1]
EXPERIMENTS = {
    "main": "Four directions from English",
    "longer": "Three times as many steps",
    "gentle": "LoRA at a tenth of its rate",
    "both-ways": "From and into English",
    "selection": "Which layers, which neurons",
    "interference": "Jointly or one by one",
    "continual": "Adding a direction",
}
"""Experiment -> title of its section, in order."""
DETECTION = ROOT / "experiments" / "results" / "detection" / "detection.json"
FIGURES = ROOT / "docs" / "figures"


def section(name: str, title: str) -> dict[str, str] | None:
    """What the page says of an experiment; None where nothing of it is finished."""
    experiment = load_experiment(ROOT / "experiments" / f"{name}.yaml")
    out = ROOT / str(experiment.results)
    if not (out / "cells").is_dir():
        return None
    results = assemble(experiment, name, out)
    return {
        "title": title,
        "state": _state(experiment, out),
        "trials": _trials(results),
        "tables": as_markdown(results),
    }


def _state(experiment: Experiment, out: Path) -> str:
    plan = Runner(experiment, ROOT / experiment.recipe).plan()
    kinds = {"trial": "trials", "steps": "runs at equal steps", "time": "runs at equal time"}
    parts = []
    for kind, name in kinds.items():
        cells = [cell for cell in plan if cell.kind == kind]
        done = sum(cell_file(out, cell).exists() for cell in cells)
        if cells:
            parts.append(f"{done} of {len(cells)} {name}")
    return f"Finished: {', '.join(parts)}. `lander experiment` runs what is missing."


def _trials(results: Mapping[str, Any]) -> str:
    """Validation chrF of every trial, the chosen one in bold."""
    rows: dict[str, list[str]] = defaultdict(list)
    for trial in sorted(results["trials"], key=lambda trial: float(trial["rate"])):
        text = f"{trial['rate']:g}: {trial['chrf']:.1f}"
        rows[trial["method"]].append(f"**{text}**" if trial["chosen"] else text)
    if not rows:
        return ""
    lines = ["| method | learning rate: validation chrF2 after the trial |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {method} | {', '.join(texts)} |" for method, texts in rows.items())])


def render() -> str:
    """The page."""
    template = (ROOT / "experiments" / "evidence.md.j2").read_text(encoding="utf-8")
    sections = [one for name, title in EXPERIMENTS.items() if (one := section(name, title)) is not None]
    environment = Environment(keep_trailing_newline=True, trim_blocks=True)
    study = facts(read_json(DETECTION, "")) if DETECTION.exists() else None
    return environment.from_string(template).render(experiments=sections, study=study)


def figures() -> dict[str, str]:
    """File name in docs/figures -> SVG."""
    if not DETECTION.exists():
        return {}
    results = read_json(DETECTION, "")
    return {
        "knock-out.svg": as_svg(knock_out_figure(results)),
        "stability.svg": as_svg(stability_figure(results)),
    }


if __name__ == "__main__":
    (ROOT / "docs" / "evidence.md").write_text(render(), encoding="utf-8")
    for name, text in figures().items():
        FIGURES.mkdir(exist_ok=True)
        (FIGURES / name).write_text(text, encoding="utf-8")
    sys.exit(0)
