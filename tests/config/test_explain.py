"""`lander config --explain`: the schema for people."""

from __future__ import annotations

import re

import pytest

from lander_ds.common.errors import ConfigError
from lander_ds.config.explain import as_markdown, as_text, explain
from lander_ds.config.keys import key_paths
from lander_ds.config.recipe import Recipe


def test_every_key_of_the_schema_is_explained() -> None:
    keys = explain()
    assert [re.sub(r"\.N(AME)?\b", "", key.path) for key in keys] == [
        ".".join(map(str, path)) for path in key_paths(Recipe)
    ]
    assert all(key.text for key in keys)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("run_dir", "run_dir: text (required)"),
        ("train.betas", "train.betas: list of 2 numbers, at least 0 and below 1 = [0.9, 0.95]"),
        ("train.steps", "train.steps: whole number, at least 1 = 1000"),
        ("train.eps", "train.eps: number, above 0 = 1e-08"),
        ("select.layers.layers", "select.layers.layers: list of whole numbers = []"),
        ("train.banks", 'train.banks: list of (general | specific) = ["general", "specific"]'),
        ("detect.examples", "detect.examples: whole number | null, at least 1 = null"),
        ("data.corpora.0.limit", "data.corpora.N.limit: whole number | null, at least 1 = null"),
        ("data.corpora.N.swap", "data.corpora.N.swap: true | false = false"),
        ("evaluate.sets", "evaluate.sets: mapping of names to sections = {}"),
        ("evaluate.sets.NAME.swap", "evaluate.sets.NAME.swap: true | false = false"),
        ("score.tokenizers", "score.tokenizers: mapping of text to text = {}"),
    ],
)
def test_types_and_defaults(path: str, line: str) -> None:
    assert as_text(explain(path)).splitlines()[0] == line


def test_a_section_shows_what_it_holds() -> None:
    assert [key.path for key in explain("train.lr")][:2] == ["train.lr", "train.lr.general"]


def test_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"did you mean train\.lr\.gates\?"):
        explain("train.lr.gate")


def test_markdown_has_a_row_for_every_key() -> None:
    page = as_markdown(explain())
    for key in explain():
        assert f"| `{key.path}` |" in page
