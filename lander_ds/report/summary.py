"""The figures of a run: what `lander summary` prints and the report starts with."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from lander_ds.common.errors import ArtefactError
from lander_ds.common.files import read_json
from lander_ds.common.run_directory import RunDirectory
from lander_ds.evaluation.documents import documented

TRAINING_FIGURES = (
    "method",
    "steps",
    "trained_parameters",
    "total_parameters",
    "ranks",
    "optimizer_bytes_per_rank",
    "gradient_bytes_per_rank",
    "weight_bytes_per_rank",
    "peak_memory_bytes_per_rank",
    "frozen_unchanged",
)
METRICS = ("bleu", "chrf", "chrfpp", "ter")
SHARES = {"empty": "are empty", "truncated": "were cut short at translate.max_new_tokens"}
"""Of the translations of a system; a system's scores say little where they are large."""
NEURAL_DIGITS = 4
"""Behind the point of neural scores, which mostly stay between 0 and 1, as `comet-score` writes them."""
P_VALUES = ("p_bleu", "p_chrf", "p_chrfpp")
SYSTEM_NAMES = {
    "baseline": "baseline",
    "base": "base",
    "fewshot": "few-shot",
    "trained": "trained",
    "trained_fewshot": "trained, few-shot",
}
"""System of `scores.json` -> its name for a person, in the order of tables and plots."""
STAGES = ("prepare", "detect", "select", "train", "translate", "score", "export", "report")


def summarise(run: RunDirectory) -> dict[str, Any]:
    """The figures of a finished or unfinished run, as JSON values; null where a stage has not run.

    `scores` holds per pair `base_bleu`, `fewshot_bleu`, `bleu` (the trained system) and so on for chrF2 (`chrf`),
    chrF2++ (`chrfpp`) and TER, the shares of `empty` and `truncated` translations, and the p-values of the trained
    system against the `baseline`: the base, or the system that `score.baseline` gave, whose scores are then there as
    `baseline_bleu` and so on. `neural` names the neural metrics, whose figures stand beside those of BLEU. `sets` is that
    of `scores.json`.

    Raises:
        ArtefactError: the directory does not exist, no stage has run in it, or an artefact is damaged.
    """
    if not run.path.is_dir():
        raise ArtefactError(f"{run.path} does not exist: give the run_dir of a recipe that has been run")
    seconds = stage_seconds(run)
    training = read_json(run.training_summary, "train again") if run.training_summary.exists() else {}
    scores = read_json(run.scores, "run stage score again") if run.scores.exists() else {"pairs": {}}
    if not seconds and not training and not scores["pairs"]:
        raise ArtefactError(
            f"{run.path} holds no stage record: no stage has finished there; run `lander prepare` first"
        )
    return {
        **{name: training.get(name) for name in TRAINING_FIGURES},
        "baseline": scores.get("baseline"),
        "scores": pair_scores(scores),
        "neural": scores.get("neural", []),
        "sets": scores.get("sets", {}),
        "stage_seconds": seconds,
        "artefacts": artefacts(run),
    }


def pair_scores(scores: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Pair -> flat figures from the contents of `scores.json`."""
    further = further_metrics(scores["pairs"], scores.get("neural", ()))
    return {pair: _flat(entry, further) for pair, entry in scores["pairs"].items()}


def further_metrics(entries: Mapping[str, Mapping[str, Any]], neural: Iterable[str]) -> dict[str, int]:
    """Metrics beside those that every run has -> digits behind the point.

    Args:
        entries: `pairs` of `scores.json`, or `directions` of a test set.
        neural: names of neural metrics.
    """
    documents = documented(of for entry in entries.values() for of in entry["systems"].values())
    return dict.fromkeys(documents, 1) | dict.fromkeys(neural, NEURAL_DIGITS)


def stage_seconds(run: RunDirectory) -> dict[str, float]:
    """Wall time of every finished stage, in the order of the stages; translate has one per system."""
    seconds = {}
    for path in sorted((run.path / "stages").glob("*.json")):
        seconds[path.stem] = float(read_json(path, f"run stage {path.stem} again").get("seconds", 0.0))
    order = {stage: number for number, stage in enumerate(STAGES)}
    return dict(sorted(seconds.items(), key=lambda item: order.get(item[0].partition(".")[0], len(order))))


def artefacts(run: RunDirectory) -> dict[str, str]:
    """Name -> path of what the run has written so far."""
    names = ("awareness", "selection", "checkpoints", "export", "translations", "scores", "metrics", "report")
    paths = {name: getattr(run, name) for name in names}
    return {name: str(path) for name, path in paths.items() if path.exists()}


def score_tables(scores: Mapping[str, Mapping[str, Any]], neural: Sequence[str]) -> list[Table]:
    """BLEU and chrF2 per pair, those of whole documents where they are known, then a table per neural metric."""
    tables = [_score_table(scores, "BLEU / chrF2", {"bleu": "BLEU", "chrf": "chrF"}, 1)]
    if documented(scores.values()):
        whole = {"doc_bleu": "BLEU", "doc_chrf": "chrF"}
        tables.append(_score_table(scores, "BLEU / chrF2 of whole documents", whole, 1))
    return tables + [_score_table(scores, name, {name: ""}, NEURAL_DIGITS) for name in neural]


def _score_table(
    scores: Mapping[str, Mapping[str, Any]], title: str, metrics: Mapping[str, str], digits: int
) -> Table:
    """Metrics (figure -> column) of every system, the gain of the trained one over the baseline by the last of them, and how
    sure it is."""
    gained, gained_label = list(metrics.items())[-1]
    present = {
        _prefix(system): name
        for system, name in SYSTEM_NAMES.items()
        if any(figures.get(f"{_prefix(system)}{gained}") is not None for figures in scores.values())
    }
    baseline = next((prefix for prefix in ("baseline_", "base_") if {prefix, ""} <= set(present)), None)
    table = Table(
        title=f"{title} per pair" + (f"; gain and p over {present[baseline]}" if baseline else ""),
        title_justify="left",
        show_footer=len(scores) > 1,
        box=box.SIMPLE_HEAD,
        # Four systems fit into 80 columns only just.
        padding=(0, 1 if len(present) < 4 else 0, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    table.add_column("pair", footer="mean")
    for prefix, system in present.items():
        for index, (metric, label) in enumerate(metrics.items()):
            column = [figures.get(prefix + metric) for figures in scores.values()]
            heading = _heading("" if index else system, label)
            table.add_column(heading, number(_mean(column), digits), justify="right")
    if baseline:
        gains = [_gain(figures, baseline, gained) for figures in scores.values()]
        mean = number(_mean(gains), digits, signed=True)
        table.add_column(_heading("gain", gained_label), mean, justify="right", style="bold")
        for label in metrics.values():
            table.add_column(_heading("p", label), justify="right")
    for pair, figures in scores.items():
        cells = [number(figures.get(prefix + metric), digits) for prefix in present for metric in metrics]
        if baseline:
            p_values = [p_value(figures.get(f"p_{metric}")) for metric in metrics]
            cells += [number(_gain(figures, baseline, gained), digits, signed=True), *p_values]
        table.add_row(pair, *cells)
    return table


def _heading(above: str, below: str) -> str:
    return f"{above}\n{below}" if below else above


def remarks(scores: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What stands beside the scores of pairs: which systems left translations empty, or were cut short."""
    lines = []
    for pair, figures in scores.items():
        for system, title in SYSTEM_NAMES.items():
            for share, what in SHARES.items():
                if value := figures.get(f"{_prefix(system)}{share}"):
                    lines.append(f"{pair}, {title}: {100 * value:.1f} % of the translations {what}")
    return lines


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Everything `summarise` returns for a person: the figures, and the table of scores below them."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    for name, value in summary.items():
        if name in ("scores", "neural", "sets"):
            continue
        if isinstance(value, Mapping):
            for key, inner in value.items():
                table.add_row(f"{name.replace('_', ' ')}: {key}", str(inner))
        else:
            table.add_row(name.replace("_", " "), _figure(value))
    outer = Table.grid(padding=(1, 0))
    outer.add_row(table)
    if summary["scores"]:
        for scored in score_tables(summary["scores"], summary["neural"]):
            outer.add_row(scored)
        for line in remarks(summary["scores"]):
            outer.add_row(line)
    return outer


def _flat(entry: Mapping[str, Any], further: Collection[str]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    metrics = (*METRICS, *further, *SHARES)
    for system in SYSTEM_NAMES:
        # Most runs do not have these, while the others are null until they are scored.
        if system not in ("baseline", "trained_fewshot") or system in entry["systems"]:
            scores = entry["systems"].get(system, {})
            figures |= {f"{_prefix(system)}{metric}": scores.get(metric) for metric in metrics}
    p_values = {name: entry.get(name) for name in (*P_VALUES, *(f"p_{name}" for name in further))}
    return {**figures, **p_values, "sentences": entry.get("sentences")}


def _figure(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(_figure(item) for item in value)
    return value if isinstance(value, str) else json.dumps(value)


def _prefix(system: str) -> str:
    """Of a system's figures: those of the trained one are what a run is about and have none."""
    return "" if system == "trained" else f"{system}_"


def _gain(figures: Mapping[str, Any], baseline: str, metric: str) -> float | None:
    before, after = figures.get(f"{baseline}{metric}"), figures.get(metric)
    return None if before is None or after is None else after - before


def _mean(values: list[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present and len(present) == len(values) else None


def number(value: float | None, digits: int = 1, signed: bool = False) -> str:
    """A score with so many digits behind the point."""
    if value is None:
        return "-"
    return f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"


def p_value(value: float | None) -> str:
    """A p-value with three."""
    return "-" if value is None else f"{value:.3f}"
