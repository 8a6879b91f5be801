"""Stages translate and score on a tiny real model: prompts, records, what is done again and what is not."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from support.tiny_translator import WORDS, tiny_llama, tiny_tokenizer

from lander_ds.common.errors import ArtefactError, ConfigError, DataError
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.recipe import ModelConfig, Recipe
from lander_ds.config.schema.data import CorpusConfig, DataConfig
from lander_ds.config.schema.results import TranslateConfig
from lander_ds.data.prepared import PreparedData
from lander_ds.data.tokens.tokenizer import load_tokenizer
from lander_ds.inference.requests import fewshot_examples, requests_for
from lander_ds.inference.translations import read_translations, write_translations
from lander_ds.stages import prepare, report, score, translate

PAIRS = ("en-de", "en-fr")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, RunDirectory]:
    """A tiny model directory and prepared corpora."""
    root = tmp_path_factory.mktemp("stages")
    tiny_llama().save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    generator = random.Random(1)
    for split, count in (("train", 60), ("test", 6)):
        for pair in PAIRS:
            lines = [
                {
                    side: " ".join(generator.choices(WORDS, k=generator.randrange(2, 9)))
                    for side in ("src", "tgt")
                }
                for _ in range(count)
            ]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (root / f"{split}.{pair}.jsonl").write_text(text)
    corpora = tuple(CorpusConfig(str(root / f"{split}.{{pair}}.jsonl"), split) for split in ("train", "test"))
    recipe = Recipe(
        run_dir=str(root / "run"),
        model=ModelConfig(str(root / "model"), dtype="float32"),
        data=DataConfig(PAIRS, corpora, detect_examples=4),
        deepspeed="none",
        translate=TranslateConfig(systems=("base", "fewshot"), max_new_tokens=6, batch_size=4, shots=3),
    )
    run = RunDirectory(recipe.run_dir)
    prepare.run(recipe, run)
    return recipe, run


def stamps(run: RunDirectory) -> dict[str, int]:
    return {
        path.parent.name + path.name: path.stat().st_mtime_ns for path in run.translations.rglob("*.jsonl")
    }


def test_translate_then_score(
    prepared: tuple[Recipe, RunDirectory],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    recipe, run = prepared
    translate.run(recipe, run)
    for system in ("base", "fewshot"):
        for pair in PAIRS:
            actual = read_translations(run.translations / system / f"{pair}.jsonl")
            assert [item.id for item in actual] == [f"{pair}:test:{number}" for number in range(6)]
    first = stamps(run)
    assert run.read_record("translate.base")["sentences"] == 12

    # Nothing changed, nothing is done; few-shot options concern the few-shot system only.
    translate.run(recipe, run)
    assert stamps(run) == first
    changed = replace(recipe, translate=replace(recipe.translate, shots=2))
    translate.run(changed, run)
    assert {name for name, stamp in stamps(run).items() if stamp != first[name]} == {
        f"fewshot{pair}.jsonl" for pair in PAIRS
    }
    # Scoring with the old recipe would mix things up.
    with pytest.raises(
        ArtefactError, match=r"fewshot was translated with other options.*run stage translate"
    ):
        score.run(recipe, run)

    capsys.readouterr()
    score.run(changed, run)
    table = capsys.readouterr().out
    assert "en-de" in table
    assert "few-shot" in table
    scores = json.loads(run.scores.read_text())
    assert set(scores["pairs"]) == set(PAIRS)
    assert scores["baseline"] == "base"
    assert scores["pairs"]["en-de"]["p_chrf"] is None
    assert 0 < scores["pairs"]["en-de"]["systems"]["fewshot"]["p_chrf"] <= 1
    assert set(scores["signatures"]["en-fr"]) == {"bleu", "chrf", "chrfpp", "ter"}
    stamp = run.scores.stat().st_mtime_ns
    score.run(changed, run)
    assert run.scores.stat().st_mtime_ns == stamp
    assert "en-de" in capsys.readouterr().out
    score.run(changed, run, force=True)
    assert run.scores.stat().st_mtime_ns != stamp


def test_limit_and_force(prepared: tuple[Recipe, RunDirectory], tmp_path: Path) -> None:
    recipe, prepared_run = prepared
    limited = replace(recipe, translate=replace(recipe.translate, systems=("base",), limit=2))
    run = RunDirectory(tmp_path)
    (tmp_path / "data").symlink_to(prepared_run.data)
    (tmp_path / "cache").symlink_to(prepared_run.path / "cache")
    translate.run(limited, run)
    path = run.translations / "base" / "en-de.jsonl"
    before = path.read_bytes()
    assert len(read_translations(path)) == 2
    # A damaged file is noticed by its hash and made again.
    write_translations(path, read_translations(path)[:1])
    translate.run(limited, run)
    assert path.read_bytes() == before
    stamp = path.stat().st_mtime_ns
    translate.run(limited, run, force=True)
    assert path.stat().st_mtime_ns != stamp
    assert path.read_bytes() == before


def test_prompts(prepared: tuple[Recipe, RunDirectory]) -> None:
    recipe, run = prepared
    data = PreparedData.load(run, recipe)
    tokenizer = load_tokenizer(recipe.model.path, False)
    plain = requests_for("base", recipe, data, tokenizer)
    fewshot = requests_for("fewshot", recipe, data, tokenizer)
    split = data.split("test")["en-de"]
    for index, request in enumerate(plain["en-de"]):
        ids, length = split.tokens(index)
        assert list(request.prompt) == ids[:length].tolist()
    # The same three examples stand before every sentence of the pair.
    first, second = fewshot["en-de"][:2]
    extra = len(first.prompt) - len(plain["en-de"][0].prompt)
    assert extra > 20
    assert len(second.prompt) - len(plain["en-de"][1].prompt) == extra
    assert first.prompt[:extra] == second.prompt[:extra]
    assert requests_for("fewshot", recipe, data, tokenizer) == fewshot
    other_seed = fewshot_examples(data.split("train")["en-de"], 3, seed=9)
    assert other_seed != fewshot_examples(data.split("train")["en-de"], 3, seed=1)


def test_what_cannot_be_translated_is_named(prepared: tuple[Recipe, RunDirectory], tmp_path: Path) -> None:
    recipe, run = prepared
    valid = replace(recipe, translate=replace(recipe.translate, split="valid"))
    with pytest.raises(DataError, match=r"translate\.split: en-de has no sentence in split valid"):
        translate.run(valid, run)
    trained = replace(recipe, translate=replace(recipe.translate, systems=("trained",)))
    with pytest.raises(ArtefactError, match="run stage train first"):
        translate.run(trained, run)
    with pytest.raises(ArtefactError, match=r"en-de\.jsonl does not exist: run stage translate"):
        score.run(recipe, RunDirectory(tmp_path))
    unknown = replace(recipe, score=replace(recipe.score, tokenizers={"de": "moses"}))
    with pytest.raises(ConfigError, match=r"score\.tokenizers\.de"):
        score.run(unknown, run)


def test_pairs_without_a_test_set(
    prepared: tuple[Recipe, RunDirectory], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the pairs that have one are translated and scored; all of them are trained."""
    recipe, _ = prepared
    train, test = recipe.data.corpora
    corpora = (train, replace(test, pairs=("en-de",)))
    recipe = replace(recipe, run_dir=str(tmp_path), data=replace(recipe.data, corpora=corpora))
    run = RunDirectory(recipe.run_dir)
    # Left from a run that tested the pair.
    (run.translations / "base").mkdir(parents=True)
    (run.translations / "base" / "en-fr.jsonl").write_text("")
    for stage in (prepare, translate, score, report):
        stage.run(recipe, run)
    assert list(PreparedData.load(run, recipe).split("train")) == list(PAIRS)
    assert list(json.loads(run.scores.read_text())["pairs"]) == ["en-de"]
    capsys.readouterr()
    with pytest.raises(DataError, match=r"en-de has no sentence in split valid"):
        translate.run(replace(recipe, translate=replace(recipe.translate, split="valid")), run)
