"""Named test sets: prepared, translated and scored apart from everything that is trained on."""

from __future__ import annotations

import json
import logging
import math
import random
import shutil
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import get_args

import pytest
import torch
from support.checkpoints import recipe_for, write_checkpoint
from support.data_helpers import write_jsonl
from support.sacrebleu_cache import fill_sacrebleu_cache
from support.tiny_models import save, tiny_model
from support.tiny_translator import WORDS, tiny_tokenizer
from torch.nn import functional

from lander_ds.cli.main import main
from lander_ds.common.errors import ArtefactError, DataError
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.recipe import Recipe
from lander_ds.config.schema.data import CorpusConfig, PromptConfig
from lander_ds.config.schema.results import EvaluateConfig, ScoreConfig, SetConfig, TranslateConfig
from lander_ds.config.schema.types import System
from lander_ds.data.prepared import NamedSet, PreparedData
from lander_ds.distributed.start import Start
from lander_ds.inference.open import open_for_inference
from lander_ds.inference.provenance import is_up_to_date
from lander_ds.inference.requests import requests_for_set
from lander_ds.inference.translations import read_translations
from lander_ds.stages import prepare, report, score, translate

PAIRS = ("en-de", "en-fr", "de-en")
generator = random.Random(1)


def sentences(count: int) -> list[tuple[str, str]]:
    def sentence() -> str:
        return " ".join(generator.choices(WORDS, k=generator.randrange(3, 9)))

    return [(sentence(), sentence()) for _ in range(count)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, corpora of three pairs, and test sets of further directions."""
    root = tmp_path_factory.mktemp("sets")
    save(tiny_model("llama"), root / "base")
    tiny_tokenizer().save_pretrained(root / "base")
    for pair in PAIRS:
        write_jsonl(root / f"train.{pair}.jsonl", sentences(30))
        write_jsonl(root / f"test.{pair}.jsonl", sentences(3))
    for pair in ("en-de", "en-es", "es-en"):
        write_jsonl(root / f"news.{pair}.jsonl", sentences(4))
    first = (root / "train.en-de.jsonl").read_text().splitlines()[0]
    with (root / "news.en-es.jsonl").open("a") as stream:
        stream.write(json.dumps({"src": "w1 w2", "tgt": f"{json.loads(first)['tgt'].upper()}!"}) + "\n")
    write_jsonl(root / "talks.en-de.jsonl", sentences(2))
    write_jsonl(root / "dev.en-es.jsonl", sentences(8))
    return root


def recipe_of(root: Path, run: Path, *names: str, shots: bool = True) -> Recipe:
    """A recipe with the test sets of these names."""
    sets = {
        "news": SetConfig(str(root / "news.{pair}.jsonl"), pairs=("en-de", "en-es", "es-en")),
        "talks": SetConfig(str(root / "talks.{pair}.jsonl"), pairs=("en-de",)),
        "captions": SetConfig("sacrebleu:multi30k/2016", pairs=("en-de",)),
    }
    plain = recipe_for(root / "base", run)
    corpora = tuple(CorpusConfig(str(root / f"{split}.{{pair}}.jsonl"), split) for split in ("train", "test"))
    dev = CorpusConfig(str(root / "dev.{pair}.jsonl"), pairs=("en-es",))
    return replace(
        plain,
        data=replace(plain.data, corpora=corpora, detect_examples=4, max_length=40),
        translate=TranslateConfig(max_new_tokens=5, batch_size=4, shots=1),
        score=ScoreConfig(bootstrap_samples=20),
        evaluate=EvaluateConfig({name: sets[name] for name in names}, (dev,) if shots else ()),
    )


def run_of(recipe: Recipe) -> RunDirectory:
    """Its run directory, everything up to the scores done."""
    run = RunDirectory(recipe.run_dir)
    prepare.run(recipe, run)
    translate.run(recipe, run)
    score.run(recipe, run)
    return run


@pytest.fixture(scope="module")
def done(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, RunDirectory]:
    """A run with the set `news`."""
    recipe = recipe_of(root, tmp_path_factory.mktemp("done"), "news")
    write_checkpoint(recipe)
    return recipe, run_of(recipe)


def test_sets_change_nothing_that_is_trained_on(done: tuple[Recipe, RunDirectory], tmp_path: Path) -> None:
    recipe, run = done
    without = replace(recipe, run_dir=str(tmp_path), evaluate=EvaluateConfig())
    prepare.run(without, RunDirectory(tmp_path))
    one, other = PreparedData.load(run, recipe), PreparedData.load(RunDirectory(tmp_path), without)
    assert one.hash == other.hash
    assert (
        json.loads((tmp_path / "stages/prepare.json").read_text())["options_hash"]
        == (run.read_record("prepare")["options_hash"])
    )
    assert not (tmp_path / "data/sets").exists()


def test_training_sentences_are_left_out_of_a_set(done: tuple[Recipe, RunDirectory]) -> None:
    recipe, run = done
    data = NamedSet.load(run, recipe, "news").data
    assert {pair: len(split) for pair, split in data.split("test").items()} == dict.fromkeys(
        ("en-de", "en-es", "es-en"), 4
    )
    assert {pair: len(split) for pair, split in data.split("train").items()} == {"en-es": 8}
    (line,) = (run.data / "sets/news/rejected.jsonl").read_text().splitlines()
    dropped = json.loads(line)
    assert (dropped["reason"], dropped["pair"]) == ("training_overlap_normalised", "en-es")


def test_every_system_and_direction_is_scored(done: tuple[Recipe, RunDirectory]) -> None:
    _, run = done
    scores = json.loads(run.scores.read_text())
    assert list(scores) == [
        *("baseline", "baseline_file", "systems", "bootstrap_samples", "pairs", "mean", "signatures", "sets")
    ]
    assert list(scores["pairs"]) == list(PAIRS)
    news = scores["sets"]["news"]
    assert {pair: entry["trained"] for pair, entry in news["directions"].items()} == {
        "en-de": True,
        "en-es": False,
        "es-en": False,
    }
    systems = {pair: set(entry["systems"]) for pair, entry in news["directions"].items()}
    # No corpus has examples of es-en.
    assert systems == {
        "en-de": {"base", "fewshot", "trained"},
        "en-es": {"base", "fewshot", "trained"},
        "es-en": {"base", "trained"},
    }
    assert set(news["mean"]["untrained"]) == {"base", "trained"}
    untrained = [news["directions"][pair]["systems"]["trained"]["chrf"] for pair in ("en-es", "es-en")]
    assert news["mean"]["untrained"]["trained"]["chrf"] == pytest.approx(sum(untrained) / 2)
    assert "off_target" in news["directions"]["en-es"]["systems"]["trained"]
    assert set(news["signatures"]) == set(news["directions"])
    assert set(news["monolingual"]) == {"de", "es", "en"}


@pytest.mark.parametrize("system", ["base", "trained"])
def test_losses_on_plain_text(done: tuple[Recipe, RunDirectory], system: str) -> None:
    """They are those of the Hugging Face model on the references alone; a trained one routes them as of no pair."""
    recipe, run = done
    actual = json.loads(run.scores.read_text())["sets"]["news"]["monolingual"]["es"][system]
    model, tokenizer = open_for_inference(Start(recipe, run), system), tiny_tokenizer()  # type: ignore[arg-type]
    texts = [line.ref for line in read_translations(run.translations_of(system, "news") / "en-es.jsonl")]
    nats, tokens = 0.0, 0
    with torch.no_grad(), model.pair("none"):
        for text in texts:
            # The tokenizer opens no text by itself.
            ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
            nats += float(
                functional.cross_entropy(model.model(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
            )
            tokens += ids.shape[1] - 1
    assert actual["sentences"] == len(texts)
    assert actual["tokens"] == tokens
    assert actual["bytes"] == sum(len(text.encode()) for text in texts)
    assert actual["nats_per_token"] == pytest.approx(nats / tokens, rel=1e-5)
    assert actual["bits_per_byte"] == pytest.approx(nats / math.log(2) / actual["bytes"], rel=1e-5)


def test_systems_of_sets_and_their_prompts(
    done: tuple[Recipe, RunDirectory], root: Path, tmp_path: Path
) -> None:
    of_sets: tuple[System, ...] = ("fewshot", "trained_fewshot")
    recipe = recipe_of(root, tmp_path, "news")
    recipe = replace(
        recipe,
        translate=replace(recipe.translate, systems=("trained",)),
        evaluate=replace(recipe.evaluate, systems=of_sets),
    )
    write_checkpoint(recipe)
    run = run_of(recipe)
    scores = json.loads(run.scores.read_text())
    assert scores["systems"] == ["trained"]
    news = scores["sets"]["news"]
    assert {
        pair: tuple(entry["systems"]) for pair, entry in news["directions"].items() if pair != "es-en"
    } == {
        "en-de": of_sets,
        "en-es": of_sets,
    }
    assert news["monolingual"] == {}
    assert not (run.translations / "trained_fewshot").exists()
    _, other = done
    texts = {
        name: [one.hyp for one in read_translations(of.translations_of(name, "news") / "en-de.jsonl")]
        for of in (run, other)
        for name in get_args(System)
        if of.translations_of(name, "news").exists()
    }
    assert texts["trained_fewshot"] not in (texts["fewshot"], texts["trained"])
    data, test_set = PreparedData.load(run, recipe), NamedSet.load(run, recipe, "news")
    requests = [requests_for_set(name, recipe, data, test_set, tiny_tokenizer()) for name in of_sets]
    assert requests[0] == requests[1]
    report.run(recipe, run)
    assert "trained, few-shot" in run.report.read_text()


def test_another_set_is_all_that_is_done(done: tuple[Recipe, RunDirectory], root: Path) -> None:
    _, run = done
    recipe = recipe_of(root, run.path, "news", "talks")
    stamps = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file()}
    with pytest.raises(ArtefactError, match=r"sets/talks/prepared\.json does not exist: run stage prepare"):
        translate.run(recipe, run)
    prepare.run(recipe, run)
    translate.run(recipe, run)
    unchanged = [path for path in stamps if path.name not in ("recipe.resolved.yaml", "scores.json")]
    assert all(path.stat().st_mtime_ns == stamps[path] for path in unchanged)
    assert is_up_to_date(Start(recipe, run), PreparedData.load(run, recipe), "trained")
    new = {path.parent.name for path in run.translations.rglob("talks/*/*.jsonl")}
    assert new == {"base", "fewshot", "trained"}
    score.run(recipe, run)
    assert list(json.loads(run.scores.read_text())["sets"]) == ["news", "talks"]


def test_a_changed_set_is_translated_again(done: tuple[Recipe, RunDirectory], root: Path) -> None:
    recipe, run = done
    limited = replace(recipe.evaluate.sets["news"], limit=2)
    changed = replace(recipe, evaluate=replace(recipe.evaluate, sets={"news": limited}))
    with pytest.raises(ArtefactError, match=r"sets/news/prepared\.json: was made for other data options"):
        translate.run(changed, run)


def test_shots_of_training_stand_before_the_prompts_of_a_set(root: Path, tmp_path: Path) -> None:
    """With `data.prompt.shots`, trained directions get the very examples of their training."""
    plain = recipe_of(root, tmp_path, "news")
    recipe = replace(plain, data=replace(plain.data, prompt=PromptConfig(shots=1), max_length=60))
    run = RunDirectory(tmp_path)
    prepare.run(recipe, run)
    data, news = PreparedData.load(run, recipe), NamedSet.load(run, recipe, "news")
    test, of_set = data.split("test")["en-de"], news.data.split("test")

    def in_common(pair: str) -> int:
        rows = zip(*(split.tokens(0)[0].tolist() for split in (test, of_set[pair])), strict=False)
        return sum(1 for _ in takewhile(lambda tokens: tokens[0] == tokens[1], rows))

    assert in_common("en-de") >= 7 > in_common("es-en")
    lengths = {pair: int(split.tokens(0)[1]) for pair, split in of_set.items()}
    assert lengths["es-en"] < min(lengths["en-de"], lengths["en-es"])


def test_directions_without_examples_are_told(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe, run = recipe_of(root, tmp_path, "news", shots=False), RunDirectory(tmp_path)
    prepare.run(recipe, run)
    with caplog.at_level(logging.INFO, "lander_ds"):
        requests = requests_for_set(
            "fewshot",
            recipe,
            PreparedData.load(run, recipe),
            NamedSet.load(run, recipe, "news"),
            tiny_tokenizer(),
        )
    assert list(requests) == ["en-de"]
    assert "translate fewshot news: en-es is left out: no corpus of evaluate.shots" in caplog.text


def test_a_direction_of_which_nothing_is_left_is_refused(root: Path, tmp_path: Path) -> None:
    recipe = recipe_of(root, tmp_path, "talks")
    trained = replace(recipe.evaluate.sets["talks"], path=str(root / "train.{pair}.jsonl"))
    recipe = replace(recipe, evaluate=EvaluateConfig({"talks": trained}))
    with pytest.raises(
        DataError, match=r"test of en-de: nothing is left of 30 lines.*correct evaluate\.sets\.talks"
    ):
        prepare.run(recipe, RunDirectory(tmp_path))


def test_a_set_of_sacrebleu(
    done: tuple[Recipe, RunDirectory],
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = RunDirectory(shutil.copytree(done[1].path, tmp_path / "run"))
    recipe = recipe_of(root, run.path, "captions")
    fill_sacrebleu_cache(monkeypatch, tmp_path, "multi30k/2016", "en-de", sentences(3))
    with caplog.at_level(logging.INFO, "lander_ds"):
        run_of(recipe)
    assert "test set captions: description: 2016 flickr test set of Multi30k dataset" in caplog.text
    assert "test set captions: citation: @InProceedings{elliott-etal-2016-multi30k," in caplog.text
    report.run(recipe, run)
    captions = json.loads(run.scores.read_text())["sets"]["captions"]
    assert set(captions["directions"]["en-de"]["systems"]) == {"base", "fewshot", "trained"}
    assert captions["origin"]["citation"].startswith("@InProceedings{elliott-etal-2016-multi30k")
    assert "captions: 2016 flickr test set of Multi30k dataset" in run.report.read_text()


def test_report_and_summary_show_the_matrix(
    done: tuple[Recipe, RunDirectory], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run = done
    report.run(recipe, run)
    page = run.report.read_text()
    assert '<h2 id="sets">Test sets</h2>' in page
    assert "en-es *" in page
    assert "bits per byte" in page
    assert main(["summary", str(run.path)]) == 0
    shown = capsys.readouterr().out
    assert "es-en *" in shown
    assert "mean *" in shown
    assert main(["summary", str(run.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sets"] == json.loads(run.scores.read_text())["sets"]
