"""Recipes from YAML: types, places, overrides, and the way back."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.workspace import RECIPE, Workspace

from lander_ds.common.errors import ConfigError
from lander_ds.config.explain import explain
from lander_ds.config.loading import dump_recipe, load_recipe
from lander_ds.config.recipe import ModelConfig, Recipe
from lander_ds.config.schema.data import CorpusConfig, DataConfig, PromptConfig
from lander_ds.config.schema.training import LearningRates, TrainConfig

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def load(tmp_path: Path, text: str, *overrides: str) -> Recipe:
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides)


def refusal(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    return str(caught.value).replace(f"{tmp_path}/", "")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_loads_and_comes_back_from_its_dump(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    assert load(tmp_path, dump_recipe(recipe)) == recipe


def test_values_get_the_types_of_the_schema(workspace: Workspace) -> None:
    recipe = load_recipe(workspace.recipe)
    assert recipe.data.pairs == ("en-de", "en-fr")
    assert recipe.train.lr == LearningRates(general=1e-4)
    assert recipe.data.corpora[1] == CorpusConfig("valid.{pair}.jsonl", split="valid")
    assert recipe.train.betas == (0.9, 0.95)


@pytest.mark.parametrize(
    ("written", "meant"), [("true", "loss"), ("false", "off"), ("off", "off"), ("chrf", "chrf")]
)
def test_keep_best_was_once_a_boolean(written: str, meant: str, workspace: Workspace) -> None:
    assert load_recipe(workspace.recipe, [f"train.keep_best={written}"]).train.keep_best == meant


def test_yaml_1_1_surprises_are_gone(tmp_path: Path) -> None:
    text = RECIPE.replace(
        "  max_length: 64\n",
        "  max_length: 64\n"
        "  filters: {test_overlap: off}\n"
        "  prompt: {language_names: {no: Norwegian, y: Yes}}\n",
    )
    recipe = load(tmp_path, text, "train.eps=1e-6", "train.weight_decay=1E-2", "train.clip=2")
    assert recipe.data.filters.test_overlap == "off"
    assert recipe.data.prompt.language_names == {"no": "Norwegian", "y": "Yes"}
    assert (recipe.train.eps, recipe.train.weight_decay, recipe.train.clip) == (1e-6, 1e-2, 2.0)
    assert isinstance(recipe.train.clip, float)
    assert "whole number, found the text '010'" in refusal(tmp_path, RECIPE, "seed=010")
    assert "whole number, found the text '1:30'" in refusal(tmp_path, RECIPE, "seed=1:30")
    assert "true or false, found the text 'no'" in refusal(tmp_path, RECIPE, "score.ter=no")


def test_empty_sections_mean_defaults_and_anchors_merge(tmp_path: Path) -> None:
    text = RECIPE.replace("  lr: {general: 1e-4}\n", "  lr:\n") + "select:\n"
    assert load(tmp_path, text).train.lr == LearningRates()
    text = RECIPE.replace(
        '    - {path: "valid.{pair}.jsonl", split: valid}\n    - {path: "test.{pair}.jsonl", split: test}\n',
        '    - &held {path: "valid.{pair}.jsonl", split: valid, limit: 5}\n'
        '    - {<<: *held, path: "test.{pair}.jsonl", split: test}\n',
    )
    assert load(tmp_path, text).data.corpora[2] == CorpusConfig("test.{pair}.jsonl", split="test", limit=5)


def test_all_problems_come_together_with_their_lines(tmp_path: Path) -> None:
    text = (
        RECIPE.replace("float32", "float33").replace("steps: 10", "stepz: 10").replace("run_dir: run\n", "")
    )
    message = refusal(tmp_path, text, "seed=x")
    assert message.startswith("r.yaml has 4 problems:")
    assert "r.yaml, line 4: model.dtype: expected one of bfloat16, float16, float32" in message
    assert "did you mean float32?" in message
    assert "r.yaml, line 13: train.stepz: unknown key; did you mean train.steps?" in message
    assert "--set seed=x: seed: expected a whole number, found the text 'x'" in message
    assert "run_dir: this required key is missing" in message


def test_a_key_in_the_wrong_section_is_pointed_home(tmp_path: Path) -> None:
    message = refusal(tmp_path, RECIPE + "beams: 4\n")
    assert message == "r.yaml, line 18: beams: unknown key here; did you mean translate.beams?"


@pytest.mark.parametrize(
    ("override", "fragment"),
    [
        ("train.steps=1.5", "train.steps: expected a whole number, found the number 1.5"),
        ("train.steps=1e3", "found the number 1000.0; write 1000"),
        ("train.steps=true", "expected a whole number, found true"),
        ("train.steps='5'", "found the text '5'; remove the quotes"),
        ("train.clip=.nan", "expected a finite number"),
        ("train.clip=.inf", "expected a finite number"),
        ("train.clip=", "expected a finite number, found nothing"),
        ("train.betas=[0.9]", "expected a list of 2, found a list of 1"),
        ("train.betas=[0, x]", "train.betas.1: expected a finite number"),
        ("train.betas.1=x", "train.betas is not in the recipe; set the whole list"),
        ("train.lr=1e-4", "train.lr: expected a section with keys, found the number 0.0001"),
        ("data.pairs=en-de", "data.pairs: expected a list, found the text 'en-de'; write [en-de]"),
        ("data.pairs=[1]", "data.pairs.0: expected text, found the number 1; put it in quotes"),
        ("model.path=7", "model.path: expected text"),
        (
            "topology=zero",
            "expected one of zero3, replicated, pipeline, pipeline_zero3, found the text 'zero'; did you mean zero3?",
        ),
        ("topology=pipeline-zero3", "did you mean pipeline_zero3?"),
        ("pipeline_cut=3", "pipeline_cut: expected a list, found the number 3; write [3]"),
        ("pipeline_cut=[1.5]", "pipeline_cut.0: expected a whole number"),
        ("train.activation_checkpointing=1", "expected true or false, found the number 1"),
        ("train.optimizer=AdamW", "did you mean adamw?"),
        ("export.formats=[dense, routd]", "export.formats.1: expected one of dense, routed"),
        ("score.tokenizers=[a]", "expected a mapping"),
        ("data.corpora.0.colums.src=a", "did you mean data.corpora.0.columns?"),
        ("data.corpora.9.path=a", "data.corpora is a list of 3"),
        ("data.corpora.first.path=a", "data.corpora is a list of 3"),
        ("train.steps.x=1", "train.steps is the number 10 and has no part named x"),
        ("train.steps", "write it as --set key=value"),
        ("=3", "write it as --set key=value"),
        ("train..steps=3", "write it as --set key=value"),
        ("data.pairs=[en-de", "not valid YAML"),
        ("data.prompt.template={src} to {tgt}", "put text with YAML punctuation in quotes"),
    ],
)
def test_overrides_that_are_refused(override: str, fragment: str, tmp_path: Path) -> None:
    message = refusal(tmp_path, RECIPE, override)
    assert f"--set {override}" in message
    assert fragment in message


def test_overrides_reach_lists_new_keys_and_whole_sections(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        RECIPE,
        "data.corpora.0.limit=10",
        "data.corpora.3={path: more.jsonl, pairs: [en-de]}",
        "translate.beams=2",
        "train.lr={gates: 1}",
        "train.lr.specific=2",
        "data.prompt.template='{src} ='",
        "model.path=a=b",
    )
    assert recipe.data.corpora[0].limit == 10
    assert recipe.data.corpora[3] == CorpusConfig("more.jsonl", pairs=("en-de",))
    assert recipe.translate.beams == 2
    assert recipe.train.lr == LearningRates(gates=1.0, specific=2.0)
    assert recipe.data.prompt.template == "{src} ="
    assert recipe.model.path == "a=b"


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"", "the recipe is empty"),
        (b"# only a comment\n", "the recipe is empty"),
        (b"- a\n- b\n", "a recipe is a mapping of keys, found a list of 2"),
        (b"just text\n", "a recipe is a mapping of keys, found the text 'just text'"),
        (b"run_dir: a\nmodel: {path: [}\n", "line 2: not valid YAML"),
        (b"run_dir: a\n\tmodel: b\n", "indent with spaces"),
        (b"run_dir: a\nmodel: \xff\n", "line 2: the recipe is not UTF-8"),
        (b"run_dir: a\nmodel: \x07\n", "line 2: YAML allows no control character"),
        (b"seed: 1\nseed: 2\n", "line 2: seed: given twice, first on line 1"),
        (b"train:\n  lr: {gates: 1, gates: 2}\n", "train.lr.gates: given twice"),
        (b"1: a\n", "a key must be text, found the number 1"),
        (b"a: 1\n---\nb: 2\n", "line 2: not valid YAML"),
        (b"run_dir: !!python/object/apply:os.getcwd []\n", "is not supported"),
        (b"run_dir: &a [*a]\n", "contains itself"),
        (b"seed: !!int abc\n", "line 1: seed: the text 'abc' is no int"),
        (b"? [a, b]\n: c\n", "a key must be text"),
    ],
)
def test_files_that_are_no_recipe(content: bytes, fragment: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert fragment in str(caught.value)
    assert "r.yaml" in str(caught.value)


def test_missing_files_and_directories(workspace: Workspace) -> None:
    with pytest.raises(
        ConfigError, match=r"recipe\.yml: the recipe does not exist; did you mean recipe\.yaml\?"
    ):
        load_recipe(Path("recipe.yml"))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_recipe(workspace.path)


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    assert load(tmp_path, "\ufeff" + RECIPE).run_dir == "run"


texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("\n\t"), max_size=20)
numbers = st.floats(0, allow_nan=False, allow_infinity=False)
shares = st.floats(0, 1, exclude_max=True)


@settings(max_examples=80)
@given(
    texts | st.sampled_from(["1e-4", "off", "0o7", "~", "1_000", "<<", "0x1f", "true", "1:30"]),
    numbers,
    shares,
)
def test_any_text_and_number_survives_the_dump(
    tmp_path_factory: pytest.TempPathFactory, text: str, clip: float, beta: float
) -> None:
    recipe = Recipe(
        run_dir=text,
        model=ModelConfig(text),
        data=DataConfig((text,), (), prompt=PromptConfig(template=text, language_names={text: text})),
        deepspeed="d",
        train=dataclasses.replace(TrainConfig(), clip=clip, betas=(beta, 0.0)),
    )
    assert load(tmp_path_factory.mktemp("dump"), dump_recipe(recipe)) == recipe


PATH_KEYS = (
    "run_dir",
    "deepspeed",
    "model.path",
    "data.corpora.0.path",
    "data.cache_dir",
    "data.replay.corpora.0.path",
    "evaluate.sets.news.path",
    "evaluate.shots.0.path",
    "score.baseline",
)
SHOTS = "evaluate.shots=[{path: dev}]"
REPLAY = "data.replay={share: 0.1, corpora: [{path: general.txt}]}"


def at(recipe: Recipe, key: str) -> object:
    value: object = recipe
    for part in key.split("."):
        if isinstance(value, tuple | dict):
            value = value[int(part)] if isinstance(value, tuple) else value[part]
        else:
            value = getattr(value, part)
    return value


@pytest.mark.parametrize("key", PATH_KEYS)
def test_a_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert at(load(tmp_path, RECIPE, SHOTS, REPLAY, f"{key}=~/a/b"), key) == "/home/me/a/b"
    assert at(load(tmp_path, RECIPE, SHOTS, REPLAY, f"{key}=a/~/b"), key) == "a/~/b"
    assert f"{key}: ~nobody-of-this-name is no user's home directory" in refusal(
        tmp_path, RECIPE, SHOTS, REPLAY, f"{key}=~nobody-of-this-name/a"
    )


def test_every_key_for_a_path_is_tried() -> None:
    named = [key.path for key in explain() if key.path.rpartition(".")[2] in ("path", "run_dir", "cache_dir")]
    tried = {key.replace(".0.", ".N.").replace(".news.", ".NAME.") for key in PATH_KEYS}
    assert tried >= set(named)
