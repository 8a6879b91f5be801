"""Texts without a pair: how they are read, filtered, cut and kept apart from everything else."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.data_helpers import MakeRecipe, write_jsonl

from lander_ds.common.errors import DataError
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.recipe import Recipe
from lander_ds.config.schema.data import (
    CorpusConfig,
    FilterConfig,
    PromptConfig,
    ReplayConfig,
    TextColumnConfig,
    TextCorpusConfig,
)
from lander_ds.config.schema.results import EvaluateConfig, SetConfig
from lander_ds.data.prepared import PreparedData, PreparedSplit
from lander_ds.data.replay import instruction
from lander_ds.data.sources.corpus import TEXT, resolve_replay
from lander_ds.data.tokens.tokenizer import load_tokenizer
from lander_ds.stages import prepare

TEXTS = [f"General text number {n}, about nothing." for n in range(5)]


@pytest.fixture
def recipe(tmp_path: Path, make_recipe: MakeRecipe) -> Recipe:
    """A recipe with a pair, a test split and a named set."""
    write_jsonl(tmp_path / "train.jsonl", [(f"sentence number {n}", f"Satz Nummer {n}") for n in range(20)])
    write_jsonl(tmp_path / "test.jsonl", [("A tested sentence", "Ein geprüfter Satz")])
    write_jsonl(tmp_path / "news.jsonl", [("Some news today", "Noticias de hoy")])
    made = make_recipe(
        CorpusConfig(str(tmp_path / "train.jsonl")),
        CorpusConfig(str(tmp_path / "test.jsonl"), split="test"),
        detect_examples=2,
    )
    news = SetConfig(str(tmp_path / "news.jsonl"), pairs=("en-es",))
    return replace(made, evaluate=EvaluateConfig(sets={"news": news}))


def replaying(recipe: Recipe, *corpora: TextCorpusConfig, **data: Any) -> Recipe:
    return replace(recipe, data=replace(recipe.data, replay=ReplayConfig(0.2, corpora), **data))


def lines(path: Path, *rows: object) -> TextCorpusConfig:
    """A corpus of JSON lines, or of plain text."""
    texts = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    content = "".join(f"{text}\n" for text in texts).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return TextCorpusConfig(str(path))


def prepared(recipe: Recipe) -> PreparedSplit:
    run = RunDirectory(recipe.run_dir)
    prepare.run(recipe, run)
    data = PreparedData.load_replay(run, recipe)
    assert data is not None
    return data.split("train")[TEXT]


def read(split: PreparedSplit, recipe: Recipe) -> list[tuple[str, str]]:
    """What the model reads, and what it learns to write, of every example."""
    tokenizer = load_tokenizer(recipe.model.path, trust_remote_code=False)
    decoded = []
    for index in range(len(split)):
        ids, prompt_length = split.tokens(index)
        decoded.append((tokenizer.decode(ids[:prompt_length]), tokenizer.decode(ids[prompt_length:])))
    return decoded


def dropped(recipe: Recipe) -> dict[str, int]:
    path = RunDirectory(recipe.run_dir).data / "replay" / "statistics.json"
    reasons: dict[str, int] = json.loads(path.read_text())[TEXT]["train"]["dropped"]
    return reasons


@pytest.mark.parametrize("name", ["general.txt", "general.txt.gz", "general.jsonl", "general.ndjson"])
def test_texts_are_targets_of_no_prompt(tmp_path: Path, recipe: Recipe, name: str) -> None:
    rows = TEXTS if "txt" in name else [{"text": text} for text in TEXTS]
    own = replaying(recipe, lines(tmp_path / name, *rows))
    eos = load_tokenizer(recipe.model.path, trust_remote_code=False).eos_token
    split = prepared(own)
    assert [(split.sentence(n).src, split.sentence(n).tgt) for n in range(5)] == [("", t) for t in TEXTS]
    for (before, target), text in zip(read(split, own), TEXTS, strict=True):
        assert text not in before
        assert target.strip() == f"{text}{eos}"
    assert len(split.tokens(0)[0]) - split.target_lengths[0] <= 1, "at most the beginning of sequence"


def test_instructions_keep_their_lines(tmp_path: Path, recipe: Recipe) -> None:
    rows = [{"q": {"ask": f"Count to {n}.\nSlowly."}, "a": f"1\n2\n{n}"} for n in range(3, 6)]
    corpus = replace(lines(tmp_path / "chat.jsonl", *rows), columns=TextColumnConfig("a", "q.ask"), limit=2)
    own = replaying(recipe, corpus)
    split = prepared(own)
    assert len(split) == 2
    assert (split.sentence(0).src, split.sentence(0).tgt) == ("Count to 3.\nSlowly.", "1\n2\n3")
    form = instruction(PromptConfig())
    assert (form.template, form.target_prefix, form.shots) == ("{src}", "\n", 0)
    chat = instruction(PromptConfig(template="chat", system="You translate.", shots=3))
    assert (chat.chat, chat.user, chat.system, chat.shots) == (True, "{src}", "", 0)


def test_what_is_too_long_is_cut_into_pieces(tmp_path: Path, recipe: Recipe) -> None:
    long = " ".join(f"word{n}" for n in range(200))
    asked = replace(
        lines(tmp_path / "asked.jsonl", {"text": long, "p": "Write."}, {"text": "Short.", "p": "Write."}),
        columns=TextColumnConfig(prompt="p"),
    )
    own = replaying(recipe, lines(tmp_path / "long.txt", long), asked, max_length=48)
    split = prepared(own)
    assert split.lengths.max() <= 48
    pieces = [split.tokens(n) for n in range(len(split)) if split.sentence(n).tgt == long]
    tokenizer = load_tokenizer(recipe.model.path, trust_remote_code=False)
    joined = [token for ids, prompt_length in pieces for token in ids[prompt_length:].tolist()]
    assert tokenizer.decode(joined).strip() == f"{long}{tokenizer.eos_token}"
    # Half an answer would teach to stop early or never.
    assert dropped(own) == {"too_many_tokens": 1}
    assert len(split) == len(pieces) + 1


def test_what_is_tested_on_is_not_replayed(tmp_path: Path, recipe: Recipe) -> None:
    rows = [
        {"text": "One line.\nein geprüfter satz!\nAnother."},
        {"text": "noticias de hoy"},
        {"text": TEXTS[0]},
        {"text": f" {TEXTS[0]} "},
        {"text": ""},
        {"text": 3},
        {"text": TEXTS[1]},
    ]
    own = replaying(recipe, lines(tmp_path / "general.jsonl", *rows))
    assert len(prepared(own)) == 2
    assert dropped(own) == {
        "test_overlap_normalised": 2,
        "duplicate": 1,
        "empty": 1,
        "malformed": 1,
    }
    off = FilterConfig(test_overlap="off", drop_duplicates=False)
    assert len(prepared(replaying(own, *own.data.replay.corpora, filters=off))) == 5


def test_texts_come_and_go_without_a_change_of_the_pairs(tmp_path: Path, recipe: Recipe) -> None:
    run = RunDirectory(recipe.run_dir)
    prepare.run(recipe, run)
    before = run.record_path("prepare").read_bytes(), PreparedData.load(run, recipe).content_hash("train")
    assert PreparedData.load_replay(run, recipe) is None
    own = replaying(recipe, lines(tmp_path / "general.txt", *TEXTS))
    assert len(prepared(own)) == 5
    assert (
        run.record_path("prepare").read_bytes(),
        PreparedData.load(run, own).content_hash("train"),
    ) == before
    stamp = run.record_path("prepare_replay").stat().st_mtime_ns
    other_share = replace(own, data=replace(own.data, replay=replace(own.data.replay, share=0.5)))
    assert len(prepared(other_share)) == 5
    assert run.record_path("prepare_replay").stat().st_mtime_ns == stamp
    lines(tmp_path / "general.txt", *TEXTS[:3])
    assert len(prepared(own)) == 3


@pytest.mark.parametrize(
    ("name", "content", "columns", "message"),
    [
        ("general.csv", "text\n", None, r"general\.csv: unknown kind of file .*corpora\[0\]\.path.*\.txt"),
        ("general.txt", "", None, r"general\.txt: is empty \(data\.replay\.corpora\[0\]\.path\).*with texts"),
        ("general.txt", "a\n", None, r"train of text: nothing is left of 1 lines .*too_short 1"),
        ("general.jsonl", '{"content": "a"}\n', None, r"no line has 'text' .*corpora\[0\]\.columns"),
        ("general.jsonl", '{"text": "a b"}\n', TextColumnConfig(prompt="q"), r"no line has 'q'"),
        ("general.jsonl", "[]\n", None, r"is a JSON array"),
    ],
)
def test_unfit_texts(
    tmp_path: Path, recipe: Recipe, name: str, content: str, columns: TextColumnConfig | None, message: str
) -> None:
    (tmp_path / name).write_text(content)
    corpus = TextCorpusConfig(str(tmp_path / name), columns=columns or TextColumnConfig())
    with pytest.raises(DataError, match=message):
        prepared(replaying(recipe, corpus, filters=FilterConfig(min_chars=2)))


def test_missing_files_and_directories(tmp_path: Path, recipe: Recipe) -> None:
    with pytest.raises(
        DataError, match=r"absent\.txt: no such file or directory \(data\.replay\.corpora\[0\]"
    ):
        resolve_replay(replaying(recipe, TextCorpusConfig(str(tmp_path / "absent.txt"))).data)
    with pytest.raises(DataError, match="is a directory, but text wants a file"):
        resolve_replay(replaying(recipe, TextCorpusConfig(str(tmp_path), format="text")).data)
