"""The report: one HTML file that needs nothing else, from whatever a run has written so far."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from lander_ds.common.run_directory import RunDirectory, versions
from lander_ds.config.loading import dump_recipe
from lander_ds.config.recipe import Recipe
from lander_ds.data.tokens.languages import split_pair
from lander_ds.inference.translations import Translation
from lander_ds.method.relevance import relevance
from lander_ds.report import plots
from lander_ds.report.artefacts import Artefacts, load_artefacts
from lander_ds.report.figures import data_uri
from lander_ds.report.sets import further_of_sets, lines, measured_systems, systems_of
from lander_ds.report.summary import SYSTEM_NAMES, further_metrics, remarks, summarise

EXAMPLES_PER_PAIR = 5


@dataclass(frozen=True)
class Plot:
    """A figure with the sentence that says what to see in it."""

    title: str
    caption: str
    uri: str


def render_report(recipe: Recipe, run: RunDirectory) -> str:
    """The report as HTML.

    Raises:
        ArtefactError: no stage has run, or an artefact is damaged.
    """
    artefacts, summary = load_artefacts(run, recipe), summarise(run)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "percent": _percent, "bytes": _bytes, "duration": _duration}
    return environment.get_template("report.html.j2").render(
        recipe=recipe,
        recipe_text=dump_recipe(recipe),
        versions=versions(),
        written=time.strftime("%Y-%m-%d %H:%M"),
        summary=summary,
        remarks=remarks(summary["scores"]),
        artefacts=artefacts,
        further=further_metrics(artefacts.scores["pairs"], summary["neural"]) if artefacts.scores else {},
        further_of_sets=further_of_sets(summary["sets"], summary["neural"]),
        gain=_mean_gain(artefacts.scores),
        system_names=SYSTEM_NAMES,
        set_lines={name: list(lines(entry)) for name, entry in summary["sets"].items()},
        set_systems=systems_of(summary["sets"]),
        measured_systems=measured_systems(summary["sets"]),
        score_plots=[_plot(*entry) for entry in _score_plots(artefacts)],
        awareness_plots=[_plot(*entry) for entry in _awareness_plots(artefacts)],
        training_plots=[_plot(*entry) for entry in _training_plots(artefacts, recipe.data.pairs)],
        splits=("train", "detect", "valid", "test"),
        examples={pair: examples(of_pair) for pair, of_pair in artefacts.translations.items()},
        languages={pair: split_pair(pair) for pair in recipe.data.pairs},
    )


def examples(systems: Mapping[str, Sequence[Translation]]) -> list[dict[str, Any]]:
    """A few sentences spread over the split, with what every system made of them."""
    reference = next(iter(systems.values()))
    step = max(1, len(reference) // EXAMPLES_PER_PAIR)
    by_id = {system: {item.id: item.hyp for item in items} for system, items in systems.items()}
    return [
        {
            "src": item.src,
            "ref": item.ref,
            "hyps": {SYSTEM_NAMES[system]: artefacts.get(item.id, "") for system, artefacts in by_id.items()},
        }
        for item in reference[step // 2 :: step][:EXAMPLES_PER_PAIR]
    ]


Entry = tuple[str, str, Any]


def _plot(title: str, caption: str, figure: Any) -> Plot:
    return Plot(title, caption, data_uri(figure))


def _score_plots(artefacts: Artefacts) -> Iterator[Entry]:
    if artefacts.scores is not None:
        yield (
            "chrF2 per pair",
            "Whiskers: 95 % confidence interval of the bootstrap.",
            plots.scores(artefacts.scores["pairs"]),
        )


def _awareness_plots(artefacts: Artefacts) -> Iterator[Entry]:
    selected = [layer.layer for layer in artefacts.selection.layers] if artefacts.selection else []
    if artefacts.awareness is not None:
        phi, pairs = artefacts.awareness.phi().numpy(), artefacts.awareness.pairs
        yield (
            "Relevance of the layers",
            "D: how much the mean FFN activation changes from a layer to the next.",
            plots.relevance_by_layer(relevance(artefacts.awareness).numpy(), pairs, selected),
        )
        yield (
            "Awareness per layer and pair",
            "How much the translation loss of a pair depends on the neurons of a layer (logarithmic).",
            plots.awareness_by_layer(phi, pairs, selected),
        )
        yield (
            "Awareness of single neurons",
            "A layer whose column is steep has few neurons that matter much.",
            plots.awareness_percentiles(phi),
        )
        if len(pairs) > 1:
            yield (
                "Overlap of the pairs' neurons",
                "Over all layers. 1: two pairs depend on the same neurons; 0: on entirely different ones.",
                plots.neuron_overlap(phi, pairs),
            )
    if artefacts.selection is not None:
        yield (
            "Banks",
            "Neurons of every selected layer by the pairs that own them.",
            plots.bank_sizes(artefacts.selection),
        )


def _metrics_of(validation: Mapping[str, Any]) -> list[str]:
    """The metrics of translations in a validation's record."""
    names = (key.removeprefix("valid_") for key in validation if key.startswith("valid_"))
    return [name for name in names if name != "loss" and not name.endswith("_mean")]


def _training_plots(artefacts: Artefacts, pairs: Sequence[str]) -> Iterator[Entry]:
    if not artefacts.steps:
        return
    yield (
        "Losses",
        "Cross-entropy in nats per target token.",
        plots.losses(artefacts.steps, artefacts.validations, pairs),
    )
    for metric in sorted({name for record in artefacts.validations for name in _metrics_of(record)}):
        yield (
            f"{'chrF' if metric == 'chrf' else metric} of the validation sentences",
            f"Translated greedily during training (train.keep_best: {metric}); the best checkpoint is that with the best "
            "mean.",
            plots.valid_scores(
                [record for record in artefacts.validations if metric in _metrics_of(record)], metric, pairs
            ),
        )
    yield (
        "Learning rates and gradient norm",
        "Groups with the same schedule share a line; the norm is the one before clipping.",
        plots.learning_rates(artefacts.steps),
    )
    if plots.gated_layers(artefacts.steps):
        yield (
            "Gates during training",
            "Above 0.5 the general banks count more, below the specific ones.",
            plots.gates_over_steps(artefacts.steps, pairs),
        )
        yield (
            "Gates at the end",
            "Mean over the last tenth of the steps.",
            plots.final_gates(artefacts.steps, pairs),
        )


def _mean_gain(scores: Mapping[str, Any] | None) -> float | None:
    means = {} if scores is None else scores["mean"]
    if "base" not in means or "trained" not in means:
        return None
    return float(means["trained"]["chrf"] - means["base"]["chrf"])


def _number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"


def _bytes(count: float | None) -> str:
    if count is None:
        return "–"
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if count >= 100 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
