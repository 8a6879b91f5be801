"""Model cards: what an export was made from and how, what it scores, what it leaves out, how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lander_ds.checkpoint.choice import as_trained
from lander_ds.common.files import read_json, write_text
from lander_ds.common.run_directory import RunDirectory, versions
from lander_ds.config.loading import dump_recipe
from lander_ds.data.tokens.languages import split_pair
from lander_ds.distributed.start import Start
from lander_ds.evaluation.documents import documented
from lander_ds.export.writer import Form
from lander_ds.models.weights import base_name
from lander_ds.report.artefacts import data_statistics
from lander_ds.report.summary import (
    METRICS,
    NEURAL_DIGITS,
    SYSTEM_NAMES,
    number,
    pair_scores,
    remarks,
)

Facts = Mapping[str, Any]
"""What is known of a training, as JSON values; a delta carries it along."""

CARD = "README.md"
_METRIC_NAMES = {"bleu": "BLEU", "chrf": "chrF2", "chrfpp": "chrF2++", "ter": "TER"}


@dataclass(frozen=True)
class Exactness:
    """What an export is of the trained model."""

    text: str
    """A sentence or two."""
    loss: Mapping[str, Any] | None = None
    """Pair -> measured scores of an approximation (see `lander_ds.export.quality`)."""

    @staticmethod
    def exact() -> Exactness:
        """It computes what was trained."""
        return Exactness("This export is exact: it computes what was trained.")

    @staticmethod
    def typed(form: Form) -> Exactness:
        """Exact up to the type of the weights."""
        if form.dtype is None:
            return Exactness.exact()
        name = str(form.dtype).removeprefix("torch.")
        return Exactness(f"The weights were converted to {name}; nothing else is left out.")

    @staticmethod
    def without_gates() -> Exactness:
        """A routed model without its gates."""
        return Exactness(
            "This export is an approximation: the trained model weighs its banks of neurons by a gate, per token, and "
            "a standard architecture has no gates. They were left out. The routed export is exact.",
        )

    @staticmethod
    def folded(pair: str, loss: Mapping[str, Any] | None) -> Exactness:
        """Gates as constants."""
        who = "the mean over all pairs" if pair == "mean" else f"the pair {pair}"
        return Exactness(
            f"This export is an approximation for {who}: the trained model weighs its banks of neurons by a gate, per "
            "token; here the gates' mean values are folded into the weights as constants. The routed export is exact.",
            loss or {},
        )


def facts_of(start: Start, checkpoint_state: Mapping[str, Any]) -> dict[str, Any]:
    """What the cards of a run's exports say, from the artefacts that are there.

    Args:
        start: names the base, and the run directory in which statistics and scores lie.
        checkpoint_state: state.json of the exported checkpoint.
    """
    recipe, run = start.recipe, start.run
    stages = ["prepare", *(["prepare_replay"] if recipe.data.replay.corpora else [])]
    records = [run.record_path(stage) for stage in stages]
    scores = read_json(run.scores, "run stage score again") if run.scores.exists() else None
    inputs: dict[str, str] = {}
    for path in (path for path in records if path.exists()):
        inputs |= read_json(path, "run stage prepare again").get("inputs", {})
    return {
        "base": {"name": base_name(recipe.model.path), "fingerprint": start.base_fingerprint},
        "method": checkpoint_state["method"],
        "step": checkpoint_state["step"],
        "pairs": list(checkpoint_state["pairs"]),
        **({"quantize": quantize} if (quantize := checkpoint_state.get("quantize")) else {}),
        "recipe": dump_recipe(as_trained(recipe, checkpoint_state)),
        "data": data_statistics(run, recipe) or {},
        "context": recipe.data.prompt.context,
        "corpora": {name: digest for name, digest in inputs.items() if name != "tokenizer"},
        "scores": None if scores is None else pair_scores(scores),
        "scored": _translated_with(run) or f"step-{checkpoint_state['step']}",
        "neural": [] if scores is None else scores.get("neural", []),
        "signatures": {} if scores is None else scores.get("signatures", {}),
        "versions": versions(),
    }


def _translated_with(run: RunDirectory) -> str | None:
    """The checkpoint that the scored translations are of; None where that is not known."""
    path = run.record_path("translate.trained")
    record: dict[str, Any] = read_json(path, "run stage translate again") if path.exists() else {}
    return record.get("checkpoint")


def write_card(directory: Path, facts: Facts, form: str, exactness: Exactness) -> None:
    """Write `README.md` into an export.

    Args:
        directory: the export.
        facts: from `facts_of`, or from a delta.
        form: routed, dense, dense-PAIR or delta.
        exactness: what it is of the trained model.
    """
    write_text(directory / CARD, render(facts, form, exactness))


def render(facts: Facts, form: str, exactness: Exactness) -> str:
    """The text of a model card."""
    sections = [
        _front_matter(facts),
        f"# {facts['base']['name']}, {_what(facts, form)}\n",
        _origin(facts),
        f"## Exactness\n\n{exactness.text}\n",
        _loss(exactness.loss),
        _loading(form, facts.get("pairs", [])),
        _scores(facts),
        _data(facts),
        _licence(facts),
        _recipe(facts),
    ]
    return "\n".join(section for section in sections if section)


def _front_matter(facts: Facts) -> str:
    languages = sorted({code for pair in facts.get("pairs", []) for code in split_pair(pair)})
    lines = ["---", "library_name: transformers", f"base_model: {json.dumps(facts['base']['name'])}"]
    lines += ["tags: [translation]"] if languages else []
    lines += [f"language: {json.dumps(languages)}"] if languages else []
    return "\n".join([*lines, "---", ""])


def _what(facts: Facts, form: str) -> str:
    pairs = ", ".join(facts.get("pairs", []))
    what = {"routed": "routed model", "dense": "dense model", "delta": "delta"}.get(
        form, f"{form} (gates folded)"
    )
    return f"{what} for translation {pairs}" if pairs else what


def _origin(facts: Facts) -> str:
    base = facts["base"]
    rows = [
        ("base model", base["name"]),
        ("base fingerprint", f"`{base['fingerprint']}`"),
        ("method", facts["method"]),
    ]
    if "quantize" in facts:
        rows.append(("trained over", f"the base in {facts['quantize']}; this export is on the base itself"))
    if "step" in facts:
        rows.append(("optimizer steps", str(facts["step"])))
    if context := facts.get("context"):
        rows.append(("context in a prompt", f"the {context} source sentences before, of the same document"))
    if "versions" in facts:
        rows.append(("made with", ", ".join(f"{name} {value}" for name, value in facts["versions"].items())))
    return _table(("", ""), rows)


def _loss(loss: Mapping[str, Any] | None) -> str:
    if loss is None:
        return ""
    if not loss:
        return "What it loses was not measured.\n"
    rows = []
    for pair, measured in loss.items():
        for metric in ("bleu", "chrf"):
            routed, folded = measured[metric]["routed"], measured[metric]["folded"]
            figures = (f"{routed:.2f}", f"{folded:.2f}", f"{folded - routed:+.2f}")
            rows.append(
                (pair, measured["split"], str(measured["sentences"]), _METRIC_NAMES[metric], *figures)
            )
    header = ("pair", "split", "sentences", "metric", "routed", "this export", "difference")
    signatures = {
        f"{pair} {name}": text
        for pair, measured in loss.items()
        for name, text in measured["signatures"].items()
    }
    return "Measured against the routed model:\n\n" + _table(header, rows) + _signatures(signatures)


def _loading(form: str, pairs: Sequence[str]) -> str:
    if form == "delta":
        return (
            "## Loading\n\n"
            "A delta needs its base; both directions are exact:\n\n"
            "```bash\n"
            "lander delta apply BASE DELTA MODEL     # writes a Hugging Face directory\n"
            "lander delta revert MODEL DELTA BASE    # gives the base back, byte for byte\n"
            "```\n"
        )
    routed = form == "routed"
    code, argument = (
        (", trust_remote_code=True", f', pair="{next(iter(pairs), "en-de")}"') if routed else ("", "")
    )
    return (
        "## Loading\n\n"
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained(directory{code})\n"
        f"tokenizer = AutoTokenizer.from_pretrained(directory{code})\n"
        f'model.generate(**tokenizer(prompt, return_tensors="pt"){argument})\n'
        "```\n"
        + (
            "\nThe directory's two Python files are the model; they need nothing but transformers. In a direction "
            'that the model was not trained for, say `pair="none"`.\n'
            if routed
            else ""
        )
        + (
            "\nThe prompt must have the form that `data.prompt` of the recipe below gives it.\n"
            if pairs
            else ""
        )
    )


def _scores(facts: Facts) -> str:
    scores = facts.get("scores")
    if not scores:
        return "## Scores\n\nNot measured when this card was written.\n" if "recipe" in facts else ""
    rows = []
    # Files of version 0.1 name no neural metrics.
    digits: dict[str, int] = dict.fromkeys(METRICS, 2) | dict.fromkeys(facts.get("neural", ()), NEURAL_DIGITS)
    digits |= dict.fromkeys(documented(scores.values()), 2)
    for pair, figures in scores.items():
        for system, title in SYSTEM_NAMES.items():
            prefix = "" if system == "trained" else f"{system}_"
            values = {metric: figures.get(prefix + metric) for metric in digits}
            if any(value is not None for value in values.values()):
                rows.append((pair, title, *(number(values[metric], digits[metric]) for metric in digits)))
    header = ("pair", "system", *(_METRIC_NAMES.get(metric, metric) for metric in digits))
    signatures = facts.get("signatures", {})
    flat = {
        f"{pair} {metric}": text for pair, of_pair in signatures.items() for metric, text in of_pair.items()
    }
    # Files of version 0.1 do not say it.
    scored, step = facts.get("scored"), facts.get("step")
    same = scored in (None, f"step-{step}")
    other = "" if same else f" **They are of {scored}, another checkpoint of this training.**"
    return (
        f"## Scores\n\nOf the trained model, not of this export where it is an approximation.{other}\n\n"
        + _table(header, rows)
        + "".join(f"\n{line}.\n" for line in remarks(scores))
        + _signatures(flat)
    )


def _data(facts: Facts) -> str:
    if not facts.get("data"):
        return ""
    rows = [
        (pair, split, *(f"{counts[name]:,}" for name in ("read", "kept", "tokens")))
        for pair, of_pair in facts["data"].items()
        for split, counts in of_pair.items()
    ]
    text = "## Data\n\n" + _table(("pair", "split", "lines read", "kept", "tokens"), rows)
    if facts.get("corpora"):
        files = [(f"`{name}`", f"`{digest}`") for name, digest in facts["corpora"].items()]
        text += "\n" + _table(("file", "SHA-256"), files)
    return text


def _licence(facts: Facts) -> str:
    return (
        "## Licence\n\n"
        f"These weights are derived from {facts['base']['name']} and follow its licence and terms of use. Name the "
        "licence of the base here, and those of the training data, before you publish them.\n"
    )


def _recipe(facts: Facts) -> str:
    return f"## Recipe\n\n```yaml\n{facts['recipe'].rstrip()}\n```\n" if facts.get("recipe") else ""


def _signatures(signatures: Mapping[str, str]) -> str:
    lines = [f"- {name}: `{text}`" for name, text in signatures.items()]
    return "\nSignatures of the metrics:\n\n" + "\n".join(lines) + "\n" if lines else ""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)
