"""`data.prompt.context`: the sentences before a sentence in its document, in every prompt that is made of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.data_helpers import MakeRecipe, write_jsonl
from support.tiny_translator import tiny_tokenizer
from support.workspace import Workspace
from transformers import LlamaConfig, LlamaForCausalLM

from lander_ds.cli.main import main
from lander_ds.common.errors import ConfigError, DataError
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.recipe import Recipe
from lander_ds.config.schema.data import ColumnConfig, CorpusConfig, PromptConfig
from lander_ds.config.schema.results import TranslateConfig
from lander_ds.config.schema.types import System
from lander_ds.data.context import Preceding
from lander_ds.data.prepared import PreparedData, prepared_options
from lander_ds.data.tokens.prompt import check_prompt, next_example, render_prompt
from lander_ds.data.tokens.prompt_format import prompt_format
from lander_ds.data.tokens.tokenizer import load_tokenizer
from lander_ds.inference.requests import requests_for
from lander_ds.inference.segments import Line, Segment, lines_of
from lander_ds.stages import prepare

TWO = PromptConfig(
    template="{context}{src_lang}: {src}\n{tgt_lang}:",
    context=2,
    context_template="Before: {context}\n",
    context_separator=" / ",
)
DOC = ColumnConfig(doc="doc")


def text(config: PromptConfig, src: str, context: Iterable[str] = (), shots: Any = ()) -> str:
    return "".join(render_prompt(config, "en-de", src, shots, tuple(context)))


def corpus(path: Path, rows: Iterable[tuple[str | None, str, str]]) -> str:
    return str(write_jsonl(path, rows, ("doc", "src", "tgt")))


def prompts(recipe: Recipe, split: Any = "train", force: bool = False) -> list[str]:
    """As the model reads them."""
    run = RunDirectory(recipe.run_dir)
    prepare.run(recipe, run, force)
    tokenizer = load_tokenizer(recipe.model.path, trust_remote_code=False)
    prepared = PreparedData.load(run, recipe).split(split)["en-de"]
    shown = []
    for index in range(len(prepared)):
        ids, length = prepared.tokens(index)
        shown.append(tokenizer.decode(ids[:length], skip_special_tokens=True))
    return shown


def with_prompt(recipe: Recipe, prompt: PromptConfig) -> Recipe:
    return replace(recipe, data=replace(recipe.data, prompt=prompt))


def test_only_those_of_the_same_document() -> None:
    preceding, seen = Preceding(2), []
    for document, src in (
        ("a", "1"),
        ("a", "2"),
        ("a", "3"),
        ("a", "4"),
        ("b", "5"),
        (None, "6"),
        (None, "7"),
        ("b", "8"),
    ):
        seen.append(preceding.of(document))
        preceding.add(src)
    assert seen == [(), ("1",), ("1", "2"), ("2", "3"), (), (), (), ()]


def test_the_template_says_where_and_how() -> None:
    assert text(TWO, "now") == "en: now\nde:"
    assert text(TWO, "now", ["a"]) == "Before: a\nen: now\nde:"
    assert text(TWO, "now", ["a", "{b}"]) == "Before: a / {b}\nen: now\nde:"
    assert text(TWO, "now", ["a"], [("one", "eins")]) == "en: one\nde: eins\n\nBefore: a\nen: now\nde:"
    twice = replace(TWO, template="{src} {context}{src} {context}{tgt_lang}")
    assert text(twice, "x", ["a"]) == "x Before: a\nx Before: a\nde"
    assert (
        next_example(replace(TWO, template="{context}Say {src}\n{tgt_lang}:", separator=" "), "en-de")
        == " Say "
    )
    # Pieces: by turns words of the recipe and of the corpus.
    assert render_prompt(TWO, "en-de", "now", (), ("a",))[1::2] == ("a", "now")


@pytest.mark.parametrize("shots", [0, 2])
def test_a_chat(shots: int) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    config = replace(TWO, template="chat", user="{context}{src_lang}: {src}", shots=shots)
    form = prompt_format(config, tokenizer)
    examples = [("one", "eins"), ("two", "zwei")][:shots]
    before = "".join(f"<user>en: {src}</><assistant>{tgt}</>" for src, tgt in examples)
    assert "".join(form.prompt("en-de", "now", examples)) == f"{before}<user>en: now</><assistant>"
    expected = f"{before}<user>Before: a / b\nen: now</><assistant>"
    prompt = form.prompt("en-de", "now", examples, ["a", "b"])
    assert "".join(prompt) == expected
    assert prompt[-4:-1:2] == ("a / b", "now")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"template": "{src} {tgt_lang}"},
            r"context: 2, but data\.prompt\.template does not say .*'\{context\}\{src\}",
        ),
        ({"context": 0}, r"template: has \{context\}, but data\.prompt\.context is 0: set it"),
        ({"context_template": "Before: "}, r"context_template: needs \{context\} once"),
        ({"context_template": "{context}{contxt}"}, r"context_template: unknown placeholder \{contxt\}"),
        ({"template": "chat", "user": "{src} {tgt_lang}"}, r"but data\.prompt\.user does not say"),
        (
            {"template": "chat", "user": "{context}{src} {tgt_lang}", "system": "{context}"},
            "system: unknown placeholder",
        ),
    ],
)
def test_what_is_refused(changed: dict[str, Any], message: str) -> None:
    check_prompt(TWO, ["en-de"])
    with pytest.raises(ConfigError, match=message):
        check_prompt(replace(TWO, **changed), ["en-de"])


@pytest.fixture
def recipe(make_recipe: MakeRecipe, tmp_path: Path) -> Recipe:
    """Two documents of training data with a sentence twice, one that is tested, one that is too short, and one alone."""
    train = corpus(
        tmp_path / "train.jsonl",
        [
            ("a", "The first one.", "Der erste."),
            ("a", "Kept apart.", "Nie gesehen."),
            ("a", "x", "y"),
            ("a", "The third one.", "Der dritte."),
            ("b", "The first one.", "Der erste."),
            ("b", "The fourth one.", "Der vierte."),
            (None, "All by itself.", "Ganz allein."),
            (None, "And another one.", "Und noch einer."),
        ],
    )
    test = corpus(
        tmp_path / "test.jsonl", [("t", "Before it.", "Davor."), ("t", "Kept apart.", "Nie gesehen.")]
    )
    corpora = (CorpusConfig(train, columns=DOC), CorpusConfig(test, split="test", columns=DOC))
    made = make_recipe(*corpora, pairs=("en-de",), detect_examples=0, max_length=200)
    filters = replace(made.data.filters, min_chars=3)
    return with_prompt(replace(made, data=replace(made.data, filters=filters)), TWO)


def test_preparation(recipe: Recipe) -> None:
    """What is dropped as a duplicate or as too short is shown all the same, what is kept apart is not."""
    assert prompts(recipe) == [
        "en: The first one.\nde:",
        "Before: The first one. / x\nen: The third one.\nde:",
        "Before: The first one.\nen: The fourth one.\nde:",
        "en: All by itself.\nde:",
        "en: And another one.\nde:",
    ]
    assert prompts(recipe, "test") == ["en: Before it.\nde:", "Before: Before it.\nen: Kept apart.\nde:"]


def test_what_is_kept_apart_is_no_context_whatever_else_drops_it(recipe: Recipe, tmp_path: Path) -> None:
    corpus(
        tmp_path / "train.jsonl",
        [("a", "Kept apart.", "Kept apart."), ("a", "The next one.", "Der nächste.")],
    )
    assert prompts(recipe) == ["en: The next one.\nde:"]


def test_several_processes_prepare_the_same(recipe: Recipe) -> None:
    one = prompts(recipe)
    assert prompts(replace(recipe, data=replace(recipe.data, workers=2)), force=True) == one


def test_what_is_translated(recipe: Recipe, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(recipe.model.path, trust_remote_code=False)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1500, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
        )
    )
    model.save_pretrained(recipe.model.path)
    recipe = replace(recipe, translate=TranslateConfig(shots=1))
    prompts(recipe)
    data = PreparedData.load(RunDirectory(recipe.run_dir), recipe)
    systems: tuple[System, ...] = ("trained", "fewshot")
    trained, fewshot = (
        tokenizer.decode(requests_for(system, recipe, data, tokenizer)["en-de"][1].prompt)
        for system in systems
    )
    assert "Before: Before it.\nen: Kept apart." in trained
    assert "Before:" not in fewshot


def test_without_a_context_nothing_changes(recipe: Recipe) -> None:
    plain = with_prompt(recipe, PromptConfig())
    options = prepared_options(replace(plain, data=replace(plain.data, corpora=(CorpusConfig("x"),))))
    assert not [key for key in options["data"]["prompt"] if key.startswith("context")]
    assert "doc" not in options["data"]["corpora"][0]["columns"]


def test_no_corpus_knows_documents(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    changed = ["data.prompt.context=2", "data.prompt.template='{context}{src} {tgt_lang}'"]
    options = [word for setting in changed for word in ("--set", setting)]
    assert main(["config", "--recipe", str(workspace.recipe), *options]) == 2
    assert "data.prompt.context: 2, but no corpus says which document a line is of" in capsys.readouterr().err


def test_files_without_columns_have_no_documents(recipe: Recipe, tmp_path: Path) -> None:
    for language in ("en", "de"):
        (tmp_path / f"moses.{language}").write_text("one\n")
    moses = CorpusConfig(str(tmp_path / "moses"), columns=DOC)
    with pytest.raises(
        DataError, match=r"data\.corpora\[0\]\.columns\.doc: .*has no columns \(format moses\)"
    ):
        prompts(replace(recipe, data=replace(recipe.data, corpora=(moses,))))


def test_lines_of_a_text_and_of_json() -> None:
    plain = [Segment(number, line, None) for number, line in enumerate(["a", "b", "", "c", "d"], start=1)]
    assert [own[0] for own in lines_of(plain, 1)] == [
        Line("a", ()),
        Line("b", ("a",)),
        Line("", ()),
        Line("c", ()),
        Line("d", ("c",)),
    ]
    rows: list[dict[str, Any]] = [
        {"src": "a\n\nb", "doc": 1},
        {"src": "c", "doc": 1},
        {"src": "d\ne"},
        {"src": "f"},
    ]
    keyed = [Segment(number, row["src"], row) for number, row in enumerate(rows, start=1)]
    assert [line.context for own in lines_of(keyed, 2) for line in own if line.text] == [
        (),
        ("a",),
        ("a", "b"),
        (),
        ("d",),
        (),
    ]
    assert {line.context for own in lines_of(keyed, 0) for line in own} == {()}


def test_what_is_scored_knows_its_document(recipe: Recipe) -> None:
    """Training data does not, and nobody does without the column."""
    prompts(recipe)
    data = PreparedData.load(RunDirectory(recipe.run_dir), recipe)
    (test,), (train,) = data.split("test").values(), data.split("train").values()
    assert [test.sentence(index).doc for index in range(len(test))] == ["t", "t"]
    assert train.sentence(0).doc is None
    plain = replace(
        recipe,
        data=replace(
            recipe.data,
            corpora=(recipe.data.corpora[0], replace(recipe.data.corpora[1], columns=ColumnConfig())),
        ),
    )
    prompts(plain)
    (test,) = PreparedData.load(RunDirectory(plain.run_dir), plain).split("test").values()
    assert test.sentence(0).doc is None
