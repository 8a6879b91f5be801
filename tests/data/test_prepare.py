"""Stage prepare, from corpora to what the other stages read."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.data_helpers import SAMPLE, MakeRecipe, write_jsonl

from lander_ds.common.errors import ArtefactError, DataError
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.recipe import ModelConfig, Recipe
from lander_ds.config.schema.data import CorpusConfig, FilterConfig, PromptConfig
from lander_ds.config.schema.types import Split
from lander_ds.data import entry as entry_module
from lander_ds.data.batching.examples import examples
from lander_ds.data.batching.plan import BatchPlan
from lander_ds.data.prepared import PreparedData
from lander_ds.data.tokens.prompt import render_prompt
from lander_ds.data.tokens.text_encoder import TextEncoder
from lander_ds.data.tokens.tokenizer import load_tokenizer
from lander_ds.stages import prepare

PAIRS = [(f"sentence number {n}", f"Satz Nummer {n}") for n in range(40)]


def prepared(recipe: Recipe, force: bool = False) -> PreparedData:
    run = RunDirectory(recipe.run_dir)
    prepare.run(recipe, run, force)
    return PreparedData.load(run, recipe)


def statistics(recipe: Recipe, pair: str = "en-de") -> dict[str, dict[str, object]]:
    actual: dict[str, dict[str, dict[str, object]]] = json.loads(
        (RunDirectory(recipe.run_dir).data / "statistics.json").read_text()
    )
    return actual[pair]


def rejected(recipe: Recipe) -> list[tuple[str, int, str]]:
    lines = (RunDirectory(recipe.run_dir).data / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    return [(Path(row["file"]).name, row["line"], row["reason"]) for row in map(json.loads, lines)]


def entries(recipe: Recipe) -> list[Path]:
    return sorted((Path(recipe.run_dir) / "cache").iterdir())


def texts(data: PreparedData, split: str, pair: str = "en-de") -> list[tuple[str, str]]:
    actual = data.split(split)[pair]  # type: ignore[arg-type]
    return [(s.src, s.tgt) for s in map(actual.sentence, range(len(actual)))]


def test_sample_end_to_end(make_recipe: MakeRecipe) -> None:
    corpora = [CorpusConfig(str(SAMPLE / f"{s}.{{pair}}.jsonl"), split=s) for s in ("train", "valid", "test")]
    recipe = make_recipe(*corpora, pairs=("en-de", "en-cs"), detect_examples=100, max_length=400)
    data = prepared(recipe)
    assert data.pairs == ("en-de", "en-cs")
    encoder = TextEncoder(load_tokenizer(recipe.model.path, trust_remote_code=False))
    for split in ("train", "detect", "valid", "test"):
        for pair, actual in data.split(split).items():
            assert (actual.pair, actual.split) == (pair, split)
            for index in (0, len(actual) - 1):
                sentence = actual.sentence(index)
                ids, prompt_length = actual.tokens(index)
                prompt = render_prompt(recipe.data.prompt, pair, sentence.src, ())
                assert encoder.examples([prompt], [" " + sentence.tgt]) == [(ids.tolist(), prompt_length)]
                assert ids.dtype == np.int32
                assert actual.lengths[index] == len(ids)
                assert actual.target_lengths[index] == len(ids) - prompt_length
                assert sentence.id == f"{pair}:{split}:{index}"
    assert len(data.split("detect")["en-cs"]) == 100
    assert not set(texts(data, "train")) & set(texts(data, "detect"))
    counts = statistics(recipe)["train"]
    assert counts["read"] == counts["kept"] + 100 + sum(counts["dropped"].values())  # type: ignore[operator, attr-defined]


def test_plan_and_examples_come_from_the_prepared_split(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(CorpusConfig(str(write_jsonl(tmp_path / "c.jsonl", PAIRS))), detect_examples=5)
    splits = list(prepared(recipe).split("train").values())
    plan = BatchPlan(
        [s.lengths for s in splits],
        [s.target_lengths for s in splits],
        batch_tokens=300,
        temperature=1.0,
        seed=1,
    )
    batch = plan.batch(1)
    actual = examples(batch, range(len(batch)), splits)
    assert [len(e.input_ids) for e in actual] == batch.lengths.tolist()
    assert [e.sample_id for e in actual] == batch.sample_ids.tolist()
    assert sum(len(e.input_ids) - e.prompt_length for e in actual) == batch.target_tokens


def test_every_reason_is_counted_and_recorded(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "test.jsonl", [("held out", "zurückgehalten")])
    train = write_jsonl(
        tmp_path / "train.jsonl",
        [
            *PAIRS,
            ("", "leer"),
            ("x", "kurz"),
            ("l" * 301, "l" * 300),
            ("short", "s" * 99),
            ("Linux", "Linux"),
            ("held out", "anders"),
            ("anything", "Zurückgehalten!"),
            PAIRS[0],
            ("word " * 55, "Wort " * 55),
        ],
    )
    with train.open("ab") as stream:
        stream.write(b'{broken\n{"src": "\xff\xfe", "tgt": "b"}\n')
    recipe = make_recipe(
        CorpusConfig(str(train)),
        CorpusConfig(str(tmp_path / "test.jsonl"), split="test"),
        filters=FilterConfig(min_chars=2, max_chars=300),
        max_length=100,
        detect_examples=8,
    )
    data = prepared(recipe)
    reasons = [
        "empty",
        "too_short",
        "too_long",
        "length_ratio",
        "identical",
        "test_overlap_exact",
        "test_overlap_normalised",
        "duplicate",
        "too_many_tokens",
        "malformed",
        "invalid_utf8",
    ]
    assert statistics(recipe)["train"]["dropped"] == dict.fromkeys(reasons, 1)
    expected = sorted(("train.jsonl", line, reason) for line, reason in enumerate(reasons, start=41))
    assert sorted(rejected(recipe)) == expected
    assert sorted(texts(data, "train") + texts(data, "detect")) == sorted(PAIRS)
    assert statistics(recipe)["train"]["moved_to_detect"] == 8


def test_detection_examples_do_not_depend_on_the_order_of_the_corpus(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", PAIRS)
    recipe = make_recipe(CorpusConfig(str(path)), detect_examples=7)
    first = texts(prepared(recipe), "detect")
    assert len(first) == 7
    write_jsonl(path, PAIRS[::-1])
    assert sorted(texts(prepared(recipe), "detect")) == sorted(first)
    assert sorted(texts(prepared(replace(recipe, seed=2)), "detect")) != sorted(first)


def test_detection_corpus_is_kept_apart_from_training(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", PAIRS)
    write_jsonl(tmp_path / "detect.jsonl", PAIRS[:3])
    recipe = make_recipe(
        CorpusConfig(str(tmp_path / "train.jsonl")),
        CorpusConfig(str(tmp_path / "detect.jsonl"), split="detect"),
    )
    data = prepared(recipe)
    assert texts(data, "detect") == PAIRS[:3]
    assert texts(data, "train") == PAIRS[3:]


def test_limit_swap_and_several_corpora(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [("", "x"), *PAIRS])
    write_jsonl(tmp_path / "b.de-en.jsonl", [(tgt + " b", src + " b") for src, tgt in PAIRS])
    recipe = make_recipe(
        CorpusConfig(str(tmp_path / "a.jsonl"), limit=3),
        CorpusConfig(str(tmp_path / "b.{pair}.jsonl"), swap=True, limit=2),
        detect_examples=0,
    )
    data = prepared(recipe)
    assert texts(data, "train") == PAIRS[:3] + [(src + " b", tgt + " b") for src, tgt in PAIRS[:2]]
    assert data.split("detect") == {}


def test_few_shot_prompts_never_show_their_own_answer(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "c.jsonl", PAIRS)
    write_jsonl(tmp_path / "t.jsonl", [("a test", "ein Test")])
    recipe = make_recipe(
        CorpusConfig(str(tmp_path / "c.jsonl")),
        CorpusConfig(str(tmp_path / "t.jsonl"), split="test"),
        prompt=PromptConfig(shots=2),
        detect_examples=4,
    )
    data = prepared(recipe)
    tokenizer = load_tokenizer(recipe.model.path, trust_remote_code=False)
    for split in ("train", "test"):
        actual = data.split(split)["en-de"]
        for index in range(len(actual)):
            ids, prompt_length = actual.tokens(index)
            prompt = tokenizer.decode(ids[:prompt_length], skip_special_tokens=True)
            assert prompt.count("English:") == 3
            assert prompt.endswith(f"English: {actual.sentence(index).src}\nGerman:")
            assert f" {actual.sentence(index).tgt}\n" not in prompt


class TestCache:
    @pytest.fixture
    def recipe(self, make_recipe: MakeRecipe, tmp_path: Path) -> Recipe:
        return make_recipe(CorpusConfig(str(write_jsonl(tmp_path / "c.jsonl", PAIRS))), detect_examples=5)

    def test_second_run_is_up_to_date(self, recipe: Recipe, caplog: pytest.LogCaptureFixture) -> None:
        prepared(recipe)
        manifest = entries(recipe)[0] / "manifest.json"
        before = manifest.stat().st_mtime_ns
        with caplog.at_level("INFO"):
            prepared(recipe)
        assert "up to date" in caplog.text
        assert manifest.stat().st_mtime_ns == before

    def test_force_replaces_what_is_damaged_and_leaves_what_is_equal(self, recipe: Recipe) -> None:
        prepared(recipe)
        (arrow,) = entries(recipe)[0].glob("*.train.arrow")
        whole, before = arrow.read_bytes(), arrow.stat().st_ino
        prepared(recipe, force=True)
        assert arrow.stat().st_ino == before
        arrow.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # of the right size: only force notices
        prepared(recipe)
        assert arrow.read_bytes() != whole
        prepared(recipe, force=True)
        assert arrow.read_bytes() == whole

    def test_a_changed_corpus_is_prepared_again(self, recipe: Recipe, tmp_path: Path) -> None:
        first = prepared(recipe)
        write_jsonl(tmp_path / "c.jsonl", PAIRS[:30])
        second = prepared(recipe)
        assert (len(entries(recipe)), first.hash == second.hash) == (2, False)
        assert len(second.split("train")["en-de"]) == 25

    def test_runs_share_a_cache_by_content(self, recipe: Recipe, tmp_path: Path) -> None:
        shared = tmp_path / "shared"
        one = replace(recipe, data=replace(recipe.data, cache_dir=str(shared)))
        shutil.copy(tmp_path / "c.jsonl", tmp_path / "copy.jsonl")
        shutil.copytree(recipe.model.path, tmp_path / "copied-model")
        two = replace(
            one,
            run_dir=str(tmp_path / "run2"),
            model=ModelConfig(str(tmp_path / "copied-model")),
            data=replace(one.data, corpora=(CorpusConfig(str(tmp_path / "copy.jsonl")),)),
        )
        assert prepared(one).hash == prepared(two).hash
        assert len(list(shared.iterdir())) == 1

    @pytest.mark.parametrize(
        "change",
        [
            {"max_length": 99},
            {"filters": FilterConfig(min_chars=2)},
            {"prompt": PromptConfig(template="{src} ->")},
            {"detect_examples": 6},
        ],
    )
    def test_options_are_part_of_the_name(self, recipe: Recipe, change: dict[str, object]) -> None:
        changed = replace(recipe, data=replace(recipe.data, **change))  # type: ignore[arg-type]
        assert prepared(recipe).hash != prepared(changed).hash

    def test_workers_change_nothing(self, make_recipe: MakeRecipe, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "c.jsonl", [(f"number {n}", f"Nummer {n}") for n in range(1500)])
        recipe = make_recipe(CorpusConfig(str(path)), detect_examples=5)
        one = prepared(recipe)
        expected = [one.split("train")["en-de"].tokens(index)[0].tolist() for index in range(1495)]
        two = prepared(replace(recipe, data=replace(recipe.data, workers=2)), force=True)
        assert one.hash == two.hash
        assert [two.split("train")["en-de"].tokens(index)[0].tolist() for index in range(1495)] == expected

    def test_failed_build_leaves_nothing(self, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(*args: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(entry_module, "publish_entry", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepared(recipe)
        assert entries(recipe) == []

    def test_damaged_entry_is_noticed_and_built_again(self, recipe: Recipe) -> None:
        prepared(recipe)
        (arrow,) = entries(recipe)[0].glob("*.train.arrow")
        arrow.write_bytes(arrow.read_bytes()[:100])
        with pytest.raises(ArtefactError, match=r"train\.arrow: is missing or damaged: run stage prepare"):
            PreparedData.load(RunDirectory(recipe.run_dir), recipe)
        assert len(prepared(recipe).split("train")["en-de"]) == 35

    def test_concurrent_builds(self, recipe: Recipe, tmp_path: Path) -> None:
        recipe = replace(recipe, data=replace(recipe.data, cache_dir=str(tmp_path / "shared")))
        runs = [replace(recipe, run_dir=str(tmp_path / f"run-{number}")) for number in range(3)]
        with ThreadPoolExecutor(3) as pool:
            hashes = {data.hash for data in pool.map(prepared, runs)}
        assert len(hashes) == 1
        assert len(list((tmp_path / "shared").iterdir())) == 1

    def test_load_refuses_what_was_prepared_for_another_recipe(self, recipe: Recipe) -> None:
        run = RunDirectory(recipe.run_dir)
        with pytest.raises(ArtefactError, match=r"prepared\.json does not exist: run stage prepare"):
            PreparedData.load(run, recipe)
        prepared(recipe)
        with pytest.raises(ArtefactError, match="another seed"):
            PreparedData.load(run, replace(recipe, seed=3))
        moved = run.path.with_name("moved")
        run.path.rename(moved)
        assert len(PreparedData.load(RunDirectory(moved), recipe).split("train")["en-de"]) == 35


class TestContentHashes:
    """A stage depends on the examples that it reads."""

    def test_test_data_are_no_part_of_what_is_trained(self, make_recipe: MakeRecipe, tmp_path: Path) -> None:
        russian = [(src, f"{tgt} ru") for src, tgt in PAIRS]
        train, other, test = (
            CorpusConfig(str(write_jsonl(tmp_path / f"{split}.{pair}.jsonl", rows)), split, pairs=(pair,))  # type: ignore[arg-type]
            for split, pair, rows in (
                ("train", "en-de", PAIRS),
                ("train", "en-ru", russian),
                ("test", "en-de", [("a test", "ein Test")]),
            )
        )
        without = make_recipe(train, other, pairs=("en-de", "en-ru"), detect_examples=5)
        added = replace(without, data=replace(without.data, corpora=(train, other, test)))
        one, two = prepared(without), prepared(added)
        assert one.hash != two.hash
        for splits in (("detect",), ("train", "valid")):
            assert one.content_hash(*splits) == two.content_hash(*splits)
        assert one.content_hash("test") != two.content_hash("test")
        assert list(two.split("test")) == ["en-de"]

    def test_what_is_trained_counts(self, make_recipe: MakeRecipe, tmp_path: Path) -> None:
        train = CorpusConfig(str(write_jsonl(tmp_path / "c.jsonl", PAIRS)))
        test = CorpusConfig(
            str(write_jsonl(tmp_path / "t.jsonl", [PAIRS[3], ("a test", "ein Test")])), split="test"
        )
        hashes = {
            data.content_hash("train", "valid")
            for data in (
                prepared(make_recipe(train, detect_examples=0)),
                prepared(make_recipe(train, detect_examples=0, prompt=PromptConfig(template="{src} ->"))),
                # This test set takes a sentence from training.
                prepared(make_recipe(train, test, detect_examples=0)),
            )
        }
        assert len(hashes) == 3


@pytest.mark.parametrize("split", ["train", "valid", "test", "detect"])
def test_losing_most_lines_is_told(
    make_recipe: MakeRecipe, tmp_path: Path, caplog: pytest.LogCaptureFixture, split: Split
) -> None:
    good = CorpusConfig(str(write_jsonl(tmp_path / "good.jsonl", PAIRS)))
    few = [("same", "same")] * 7 + [("", "empty")] * 4 + [(f"only {n}", f"nur {n}") for n in range(10)]
    bad = CorpusConfig(str(write_jsonl(tmp_path / "bad.jsonl", few)), split)
    corpora = (bad,) if split == "train" else (good, bad)
    prepared(make_recipe(*corpora, detect_examples=0))
    wording = f"11 of 21 {split} lines of en-de were dropped, most of them (7) as identical"
    assert wording in caplog.text
    assert caplog.text.count("most of them") == 1


def test_empty_split_names_what_was_dropped(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", [("a", "a"), ("", "b")])
    with pytest.raises(
        DataError,
        match=r"train of en-de: nothing is left of 2 lines \(dropped: identical 1, empty 1; .*jsonl line 1",
    ):
        prepared(make_recipe(CorpusConfig(str(path))))
    assert not list((tmp_path / "run").glob("cache/*"))
    assert not (tmp_path / "run" / "stages").exists()
