"""Model cards: complete where everything is known, honest where it is not, and valid Markdown with front matter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.tiny_run import PAIRS, TinyRun

from lander_ds.checkpoint.identity import identity_of
from lander_ds.common.files import write_json
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.loading import load_recipe
from lander_ds.config.recipe import Recipe
from lander_ds.config.schema.data import PromptConfig, ReplayConfig, TextCorpusConfig
from lander_ds.distributed.start import Start
from lander_ds.export.card import Exactness, facts_of, render
from lander_ds.export.writer import Form


def state_of(recipe: Recipe) -> dict[str, Any]:
    return {**identity_of(recipe, {"base": "none", "data": "none"}), "step": 20}


SIGNATURE = "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0"
LOSS = {
    "en-de": {
        "split": "test",
        "sentences": 50,
        "bleu": {"routed": 20.0, "folded": 19.25, "difference": -0.75, "p": 0.1},
        "chrf": {"routed": 40.5, "folded": 40.0, "difference": -0.5, "p": 0.2},
        "signatures": {"bleu": SIGNATURE, "chrf": "chrF-signature"},
    }
}


def scored(run: RunDirectory) -> None:
    """Scores as stage score writes them."""
    figures = {"bleu": 12.345, "chrf": 33.0, "chrfpp": 30.0, "ter": 80.0}
    entry = {"sentences": 6, "systems": {"base": figures, "trained": {**figures, "bleu": 23.456}}}
    write_json(
        run.scores,
        {
            "baseline": "base",
            "pairs": dict.fromkeys(PAIRS, entry),
            "signatures": {pair: {"bleu": SIGNATURE} for pair in PAIRS},
        },
    )


@pytest.fixture
def facts(tiny_run: TinyRun, tmp_path: Path) -> dict[str, Any]:
    recipe = replace(tiny_run.recipe("prepared"), run_dir=str(tmp_path))
    run = RunDirectory(tmp_path)
    source = RunDirectory(tiny_run.root / "prepared")
    for path in (source.data / "statistics.json", source.record_path("prepare")):
        target = run.path / path.relative_to(source.path)
        target.parent.mkdir(exist_ok=True)
        target.write_text(path.read_text())
    scored(run)
    return facts_of(Start(recipe, run), state_of(recipe))


def test_replay_and_context_are_named(facts: dict[str, Any], tiny_run: TinyRun, tmp_path: Path) -> None:
    assert not {"replay", "context in a prompt"} & set(render(facts, "routed", Exactness.exact()).split("| "))
    recipe, run = replace(tiny_run.recipe("prepared"), run_dir=str(tmp_path)), RunDirectory(tmp_path)
    texts = ReplayConfig(corpora=(TextCorpusConfig("news.txt"),), share=0.1)
    prompt = PromptConfig(template="{context}{src} {tgt_lang}", context=3)
    recipe = replace(recipe, data=replace(recipe.data, replay=texts, prompt=prompt))
    write_json(
        run.data / "replay" / "statistics.json", {"text": {"train": {"read": 7, "kept": 5, "tokens": 1234}}}
    )
    write_json(run.record_path("prepare_replay"), {"inputs": {"news.txt": "digest"}})
    text = render(facts_of(Start(recipe, run), state_of(recipe)), "routed", Exactness.exact())
    assert "| replay | train | 7 | 5 | 1,234 |" in text
    assert "| `news.txt` | `digest` |" in text
    assert "| context in a prompt | the 3 source sentences before, of the same document |" in text


def front_matter(text: str) -> dict[str, Any]:
    _, head, _ = text.split("---\n", 2)
    actual: dict[str, Any] = yaml.safe_load(head)
    return actual


def test_a_card_says_where_a_model_comes_from(
    facts: dict[str, Any], tiny_run: TinyRun, tmp_path: Path
) -> None:
    text = render(facts, "routed", Exactness.exact())
    assert front_matter(text) == {
        "library_name": "transformers",
        "base_model": "model",
        "tags": ["translation"],
        "language": ["de", "en", "es", "fr"],
    }
    for part in (
        "# model, routed model for translation en-de, en-fr, en-es",
        facts["base"]["fingerprint"],
        "| optimizer steps | 20 |",
        "| en-de | trained | 23.46 | 33.00 | 30.00 | 80.00 |",
        "| en-de | base | 12.35 |",
        f"- en-de bleu: `{SIGNATURE}`",
        "| en-de | train | 100 |",
        "from_pretrained(directory, trust_remote_code=True)",
        'pair="en-de")',
        "follow its licence",
        "exact: it computes what was trained",
    ):
        assert part in text, part
    [corpus] = [name for name in facts["corpora"] if name.endswith("train.en-de.jsonl")]
    assert facts["corpora"][corpus] in text
    recipe = text.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "again.yaml").write_text(recipe)
    assert load_recipe(tmp_path / "again.yaml") == replace(tiny_run.recipe("prepared"), run_dir=str(tmp_path))


def test_scores_of_another_checkpoint_are_said_to_be_such(tiny_run: TinyRun, tmp_path: Path) -> None:
    recipe, run = replace(tiny_run.recipe("prepared"), run_dir=str(tmp_path)), RunDirectory(tmp_path)
    scored(run)
    for checkpoint, wording in (("step-20", False), ("step-10", True)):
        write_json(run.record_path("translate.trained"), {"checkpoint": checkpoint})
        text = render(facts_of(Start(recipe, run), state_of(recipe)), "routed", Exactness.exact())
        assert ("They are of step-10, another checkpoint of this training" in text) is wording


def test_facts_are_json_values(facts: dict[str, Any]) -> None:
    assert json.loads(json.dumps(facts)) == facts


def test_what_folding_costs_stands_in_the_card(facts: dict[str, Any]) -> None:
    text = render(facts, "dense-en-de", Exactness.folded("en-de", LOSS))
    assert "an approximation for the pair en-de" in text
    assert "| en-de | test | 50 | BLEU | 20.00 | 19.25 | -0.75 |" in text
    assert "| en-de | test | 50 | chrF2 | 40.50 | 40.00 | -0.50 |" in text
    assert f"- en-de bleu: `{SIGNATURE}`" in text
    assert "trust_remote_code=" not in text
    assert "not measured" in render(facts, "dense-mean", Exactness.folded("mean", None))


def test_what_is_left_out_stands_in_the_card(facts: dict[str, Any]) -> None:
    assert "They were left out" in render(facts, "dense", Exactness.without_gates())
    assert "converted to bfloat16" in render(facts, "dense", Exactness.typed(Form(torch.bfloat16)))
    assert "is exact" in render(facts, "dense", Exactness.typed(Form()))
    assert "lander delta revert" in render(facts, "delta", Exactness.exact())


def test_a_run_of_which_little_is_known(tiny_run: TinyRun, tmp_path: Path) -> None:
    recipe = replace(tiny_run.recipe("prepared"), run_dir=str(tmp_path))
    text = render(
        facts_of(Start(recipe, RunDirectory(tmp_path)), state_of(recipe)), "routed", Exactness.exact()
    )
    assert "Not measured when this card was written" in text
    assert "## Data" not in text
    bare = {"base": {"name": "x", "fingerprint": "sha256:0"}, "method": "difference to y"}
    text = render(bare, "delta", Exactness.exact())
    assert front_matter(text) == {"library_name": "transformers", "base_model": "x"}
    assert "## Scores" not in text
