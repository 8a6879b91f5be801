"""Results as tables: Markdown, CSV, HTML. One per variant and comparison."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from jinja2 import Environment

from lander_ds.experiment.results import TEST

TITLES = {"steps": "At equal steps", "time": "At equal training time"}

_HTML = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{{ name }}</title>
<style>body{font:15px/1.5 sans-serif;margin:2em auto;max-width:75em}table{border-collapse:collapse;margin:1em 0}
td,th{padding:.25em .7em;border-bottom:1px solid #ccc;text-align:right}td:first-child,th:first-child{text-align:left}
</style>
<h1>{{ name }}</h1>
{% for table in tables %}<h2>{{ table.title }}</h2>
<table><tr>{% for cell in table.header %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in table.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>{% endfor %}
{% for metric, signature in signatures %}<p>{{ metric }}: <code>{{ signature }}</code></p>
{% endfor %}</html>
"""


@dataclass(frozen=True)
class Table:
    """A title, names of columns, and rows of texts."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables(results: Mapping[str, Any]) -> list[Table]:
    """The tables of an experiment's results, best mean chrF first."""
    groups: dict[tuple[str, str], dict[str, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for cell in results["cells"]:
        groups[cell["variant"], cell["at"]][cell["method"]].append(cell)
        if (
            cell["method"] == results["baseline"]
            and cell["at"] == "steps"
            and _is_timed(results, cell["variant"])
        ):
            groups[cell["variant"], "time"][cell["method"]].append(cell)
    several = len({variant for variant, _ in groups}) > 1
    result = []
    for (variant, at), methods in sorted(groups.items()):
        title = f"{TITLES[at]}: {variant}" if several else TITLES[at]
        tested = {name: cells for name, cells in methods.items() if cells[0]["scores"]}
        result.append(_table(results, variant, at, tested, title))
        for name in dict.fromkeys(name for cells in methods.values() for name in cells[0]["sets"]):
            result.append(_set_table(results, variant, at, methods, name, f"{title}: test set {name}"))
    return [*result, *_variant_tables(results)]


def _variant_tables(results: Mapping[str, Any]) -> list[Table]:
    """By how much chrF2 a method is better in the first variant than in another, on the directions of both."""
    by_kind: dict[tuple[str, str], dict[str, dict[str, Mapping[str, Any]]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for row in results["variants"]:
        by_kind[row["at"], row["a"]][row["method"]][row["b"]] = row
    result = []
    for (at, first), methods in by_kind.items():
        others = list(dict.fromkeys(other for of in methods.values() for other in of))
        rows = [
            [method, *("{} (p {})".format(*_versus(of[other])) if other in of else "" for other in others)]
            for method, of in methods.items()
        ]
        result.append(Table(f"{TITLES[at]}: {first} against the other variants", ["method", *others], rows))
    return result


def _is_timed(results: Mapping[str, Any], variant: str) -> bool:
    return any(cell["at"] == "time" and cell["variant"] == variant for cell in results["cells"])


def _table(
    results: Mapping[str, Any],
    variant: str,
    at: str,
    methods: Mapping[str, Sequence[Mapping[str, Any]]],
    title: str,
) -> Table:
    pairs = list(next(iter(methods.values()))[0]["scores"])
    times = results["step_seconds"].get(variant, {})
    against = _comparisons(results, variant, at, TEST)
    header = [
        "method",
        "lr",
        "steps",
        "parameters",
        "optimizer",
        "step",
        *pairs,
        "chrF",
        "BLEU",
        "difference",
        "p",
    ]
    ordered = sorted(methods.items(), key=lambda item: -_mean(item[1], "chrf"))
    rows = []
    for method, cells in ordered:
        first, versus = cells[0], against.get(method)
        ratio = times.get(method, 0.0) / times[results["baseline"]] if results["baseline"] in times else 0.0
        rows.append(
            [
                method,
                "" if first["lr"] is None else f"{first['lr']:g}",
                "" if first["steps"] is None else str(first["steps"]),
                _millions(first["trained_parameters"]),
                _megabytes(first["optimizer_bytes"]),
                f"{ratio:.2f}" if ratio else "",
                *(f"{fmean(cell['scores'][pair]['chrf'] for cell in cells):.1f}" for pair in pairs),
                _with_spread(cells, "chrf"),
                _with_spread(cells, "bleu"),
                *_versus(versus),
            ]
        )
    return Table(title, header, rows)


def _set_table(
    results: Mapping[str, Any],
    variant: str,
    at: str,
    methods: Mapping[str, Sequence[Mapping[str, Any]]],
    name: str,
    title: str,
) -> Table:
    """chrF2 and share of translations in a wrong language, per direction of a named set."""
    of_set = {
        method: [cell["sets"][name] for cell in cells if name in cell["sets"]]
        for method, cells in methods.items()
    }
    pairs = list(
        dict.fromkeys(pair for cells in of_set.values() for cell in cells for pair in cell["scores"])
    )
    against = _comparisons(results, variant, at, name)
    ranked = []
    for method, cells in of_set.items():
        if not cells:
            continue
        # Prompts cannot show examples in every direction.
        whole = all(pair in cell["scores"] for pair in pairs for cell in cells)
        row = [
            method,
            *(
                _score_and_share([cell["scores"][pair] for cell in cells if pair in cell["scores"]])
                for pair in pairs
            ),
            _with_spread(cells, "chrf") if whole else "",
            _mean_bits(cells),
            *_versus(against.get(method)),
        ]
        ranked.append((_mean(cells, "chrf") if whole else 0.0, row))
    ranked.sort(key=lambda item: -item[0])
    header = ["method", *pairs, "chrF", "bits per byte", "difference", "p"]
    return Table(title, header, [row for _, row in ranked])


def _score_and_share(scores: Sequence[Mapping[str, float]]) -> str:
    """chrF2 and off-target rate of a direction, means over seeds."""
    if not scores:
        return ""
    return f"{fmean(one['chrf'] for one in scores):.1f}, {fmean(one['off_target'] for one in scores):.0%}"


def _comparisons(results: Mapping[str, Any], variant: str, at: str, on: str) -> dict[str, Mapping[str, Any]]:
    """Method -> its comparison with the baseline."""
    return {
        row["a"]: row
        for row in results["comparisons"]
        if (row["variant"], row["at"], row["on"]) == (variant, at, on)
    }


def _versus(comparison: Mapping[str, Any] | None) -> tuple[str, str]:
    """Difference and p-value."""
    if comparison is None:
        return "", ""
    return f"{comparison['mean_chrf_diff']:+.2f}", f"{comparison['p']:.3f}"


def _mean(cells: Sequence[Mapping[str, Any]], metric: str) -> float:
    return fmean(score[metric] for cell in cells for score in cell["scores"].values())


def _with_spread(cells: Sequence[Mapping[str, Any]], metric: str) -> str:
    """Mean over pairs, then mean and standard deviation over seeds."""
    each = [fmean(score[metric] for score in cell["scores"].values()) for cell in cells]
    return f"{fmean(each):.2f}" + (f" ± {stdev(each):.2f}" if len(each) > 1 else "")


def _mean_bits(cells: Sequence[Mapping[str, Any]]) -> str:
    """Loss on plain text; prompts with examples change nothing of it and have none."""
    bits = [bits for cell in cells for bits in cell["bits_per_byte"].values()]
    return f"{fmean(bits):.3f}" if bits else ""


def _millions(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.1f} M"


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.0f} MB"


def as_markdown(results: Mapping[str, Any]) -> str:
    """All tables, what the columns mean, and the signatures."""
    parts = []
    for table in tables(results):
        lines = [table.header, ["---", *["--:"] * (len(table.header) - 1)], *table.rows]
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"### {table.title}\n\n{body}\n")
    if not parts:
        return "No cell of a comparison is finished yet.\n"
    signatures = "\n".join(f"- {what}: `{text}`" for what, text in _signatures(results))
    parts.append(
        f"Columns of directions are chrF2, of named sets with the share of translations in a wrong language; `bits per "
        f"byte` is the loss of their plain text; means and standard deviations are over seeds; `step` is the time of a step "
        f"over that of `{results['baseline']}`; `difference` is in chrF2 against `{results['baseline']}` (of prompts with "
        f"examples, `few-shot`, against its own with examples, where it has them), with the p-value of a paired "
        f"bootstrap in which all seeds share the drawn sentences.\n\n{signatures}\n"
    )
    return "\n".join(parts)


def _signatures(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Metric, with the directions where they have not all the same, and signature."""
    pairs: dict[tuple[str, str], list[str]] = defaultdict(list)
    for pair, of_pair in results["signatures"].items():
        for metric, text in of_pair.items():
            pairs[metric, text].append(pair)
    every = len(results["signatures"])
    return [
        (metric if len(of) == every else f"{metric} ({', '.join(of)})", text)
        for (metric, text), of in pairs.items()
    ]


def as_csv(results: Mapping[str, Any]) -> str:
    """All tables below one another, each row with its table's title first."""
    stream = io.StringIO()
    writer = csv.writer(stream)
    for table in tables(results):
        writer.writerow(["table", *table.header])
        writer.writerows([table.title, *row] for row in table.rows)
    return stream.getvalue()


def as_html(results: Mapping[str, Any]) -> str:
    """A page without scripts."""
    template = Environment(autoescape=True).from_string(_HTML)
    return template.render(
        name=results["experiment"], tables=tables(results), signatures=_signatures(results)
    )
