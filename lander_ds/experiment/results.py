"""The results of an experiment as one JSON value: what was tried, what was chosen, every cell, every comparison.

Everything in it is computed from what finished cells have published (`outcome`), so it can be computed again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from lander_ds.common.errors import ArtefactError
from lander_ds.common.files import read_json
from lander_ds.evaluation.pooled import compare
from lander_ds.experiment.grid import Experiment, trials
from lander_ds.experiment.outcome import (
    CURE,
    EXAMPLES,
    Figures,
    cell_file,
    hypotheses,
    mean_chrf,
    method_name,
    published,
    references,
)

RESULTS_FILE = "results.json"
TEST = "test"
"""What comparisons call the test split, beside the names of sets."""

Key = tuple[str, str]
"""(method, variant)."""
Texts = dict[tuple[str, str, str], list[dict[tuple[str, str], str]]]
"""(kind, variant, method) -> seed -> (direction, id) -> translation."""


def chosen_rates(experiment: Experiment, out: Path) -> dict[Key, float | None]:
    """(method, variant) -> the learning rate with the best validation chrF, of methods whose trials are all finished.

    Args:
        experiment: the experiment.
        out: its results.
    """
    scores: dict[Key, list[tuple[float, float]]] = defaultdict(list)
    for cell in trials(experiment):
        path = cell_file(out, cell)
        if path.exists() and cell.rate is not None:
            scores[cell.method, cell.variant].append((mean_chrf(read_json(path, CURE)), cell.rate))
    rates: dict[Key, float | None] = {}
    for name, method in experiment.methods.items():
        source = experiment.methods[method.tuned_as or name]
        for variant in experiment.variant_names:
            tried = scores[method.tuned_as or name, variant]
            if tried and len(tried) == len(source.rates):
                rates[name, variant] = max(tried)[1]
    return rates


def step_seconds(experiment: Experiment, out: Path) -> dict[Key, float]:
    """(method, variant) -> time of a step by the experiment's clock: the median of its finished cells' medians."""
    times: dict[Key, list[float]] = defaultdict(list)
    for figures in published(out):
        if experiment.clock in figures["step_seconds"]:
            times[figures["method"], figures["variant"]].append(figures["step_seconds"][experiment.clock])
    return {key: median(values) for key, values in times.items()}


def assemble(experiment: Experiment, name: str, out: Path) -> dict[str, Any]:
    """The content of results.json.

    Args:
        experiment: the experiment.
        name: its name.
        out: its results.

    Raises:
        ArtefactError: no cell is finished yet.
    """
    everything = published(out)
    cells = [figures for figures in everything if figures["kind"] != "trial"]
    if not everything:
        raise ArtefactError(f"{out}: no cell is finished yet: run lander experiment first")
    texts = texts_of(cells, out)
    chosen = chosen_rates(experiment, out)
    times: dict[str, dict[str, float]] = defaultdict(dict)
    for (method, variant), seconds in step_seconds(experiment, out).items():
        times[variant][method] = round(seconds, 3)
    return {
        "experiment": name,
        "baseline": experiment.baseline,
        "clock": experiment.clock,
        "trials": [
            {
                **{key: figures[key] for key in ("method", "variant", "rate", "steps")},
                "chrf": round(mean_chrf(figures), 3),
                "chosen": chosen.get((figures["method"], figures["variant"])) == figures["rate"],
            }
            for figures in everything
            if figures["kind"] == "trial"
        ],
        "step_seconds": times,
        "signatures": everything[0]["signatures"],
        "cells": [row for figures in cells for row in _rows(figures)],
        "comparisons": comparisons(experiment.baseline, texts, out),
        "variants": across_variants(experiment, texts, out),
    }


def _rows(figures: Figures) -> list[dict[str, Any]]:
    """One per system; `scores` is empty for one that has translated named test sets alone."""
    in_sets = (system for one in figures["sets"].values() for system in one["systems"])
    names = ("variant", "seed", "steps", "trained_parameters", "optimizer_bytes", "peak_memory", "date")
    return [
        {
            "method": method_name(system, figures["method"]),
            "at": figures["kind"],
            "lr": figures["rate"],
            "seconds": figures["training_seconds"],
            **{name: figures[name] for name in names},
            "scores": figures["systems"].get(system, {}),
            "sets": {
                name: {
                    "scores": one["systems"][system],
                    "bits_per_byte": {
                        language: losses[system]
                        for language, losses in one["bits_per_byte"].items()
                        if system in losses
                    },
                }
                for name, one in figures["sets"].items()
                if one["systems"].get(system)
            },
        }
        for system in dict.fromkeys((*figures["systems"], *in_sets))
    ]


def texts_of(cells: Sequence[Figures], out: Path) -> Texts:
    """The published translations of cells that are no trials."""
    texts: Texts = defaultdict(list)
    for figures in cells:
        for system, translations in hypotheses(out, figures).items():
            method = method_name(system, str(figures["method"]))
            texts[figures["kind"], figures["variant"], method].append(translations)
    return texts


def comparisons(baseline: str, texts: Texts, out: Path) -> list[dict[str, Any]]:
    """Every method against the baseline at equal steps and at equal time, from the published translations.

    Args:
        baseline: method; its runs at equal steps are what both comparisons are against. What prompts with examples
            gave is compared with what they gave the baseline, where it had them.
        texts: translations of cells that are no trials.
        out: the results.
    """
    sources = {variant: references(out, variant) for variant in {key[1] for key in texts}}
    rows = []
    for (at, variant, method), mine in sorted(texts.items()):
        rivals = [baseline + EXAMPLES, baseline] if method.endswith(EXAMPLES) else [baseline]
        against = {rival: texts.get(("steps", variant, rival), []) for rival in rivals}
        refs: dict[str, dict[tuple[str, str], str]] = defaultdict(dict)
        for key, row in sources[variant].items():
            if all(key in one for one in mine):
                refs[_set_of(key)][key] = row["ref"]
        for name, of_set in refs.items():
            common = {rival: _common(of_set, its) for rival, its in against.items()}
            rival = next((rival for rival in rivals if common[rival]), method)
            if rival == method:
                continue
            compared = _compared(common[rival], mine, against[rival])
            rows.append({"a": method, "b": rival, "variant": variant, "at": at, "on": name, **compared})
    return rows


def across_variants(experiment: Experiment, texts: Texts, out: Path) -> list[dict[str, Any]]:
    """Every trained method in the first variant against itself in each other, on the test sentences that both have.

    Args:
        experiment: the experiment.
        texts: translations of cells that are no trials.
        out: the results.
    """
    first, *others = experiment.variant_names
    trained = {name for name, method in experiment.methods.items() if method.trained}
    sentences = {name: references(out, name) for name in experiment.variant_names}
    rows = []
    for (at, variant, method), its in sorted(texts.items()):
        mine = texts.get((at, first, method), [])
        if variant not in others or method not in trained or not mine:
            continue
        refs = {
            key: row["ref"]
            for key, row in sentences[first].items()
            # Variants may have test corpora of their own, in which an id is another sentence.
            if _set_of(key) == TEST and sentences[variant].get(key) == row
        }
        if common := _common(_common(refs, mine), its):
            rows.append(
                {"method": method, "at": at, "a": first, "b": variant, **_compared(common, mine, its)}
            )
    return rows


def _set_of(key: tuple[str, str]) -> str:
    """The test set that a published sentence, (pair, id), is of."""
    return key[0].rpartition(":")[0] or TEST


def _common(
    refs: Mapping[tuple[str, str], str], seeds: Sequence[Mapping[tuple[str, str], str]]
) -> dict[tuple[str, str], str]:
    """The references of what every seed has translated; none without seeds."""
    return {key: ref for key, ref in refs.items() if seeds and all(key in one for one in seeds)}


def _compared(
    refs: Mapping[tuple[str, str], str],
    mine: Sequence[Mapping[tuple[str, str], str]],
    its: Sequence[Mapping[tuple[str, str], str]],
) -> dict[str, Any]:
    keys: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for key in refs:
        keys[key[0]].append(key)

    def side(seeds: Sequence[Mapping[tuple[str, str], str]]) -> dict[str, list[list[str]]]:
        return {pair: [[one[key] for key in of_pair] for one in seeds] for pair, of_pair in keys.items()}

    difference = compare(
        {pair: [refs[key] for key in of_pair] for pair, of_pair in keys.items()}, side(mine), side(its)
    )
    return {
        "seeds": [len(mine), len(its)],
        "mean_chrf_diff": round(difference.mean, 3),
        "interval": [round(difference.low, 3), round(difference.high, 3)],
        "p": round(difference.p, 4),
        "per_pair": {pair: round(value, 3) for pair, value in difference.per_pair.items()},
    }
