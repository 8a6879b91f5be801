"""Base models by hub id, from a cache that the test fills; nothing is downloaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]
from support.data_helpers import write_jsonl
from support.tiny_models import save, tiny_model
from support.tiny_translator import tiny_tokenizer

from lander_ds.cli.main import main
from lander_ds.common.errors import ConfigError, ModelError
from lander_ds.config.loading import load_recipe
from lander_ds.config.recipe import ModelConfig, Recipe
from lander_ds.config.schema.data import DataConfig
from lander_ds.models import hub
from lander_ds.models.hub import with_local_model
from lander_ds.models.weights import base_name
from lander_ds.preflight.recipe import check_recipe

COMMIT, OLDER = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with two commits of one model, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--team--tiny"
    for name, commit in (("main", COMMIT), ("v1", OLDER)):
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    return repository


def recipe_of(path: str, **model: Any) -> Recipe:
    return Recipe("run", ModelConfig(path, **model), DataConfig(("en-de",), ()), "none")


@pytest.mark.parametrize(("revision", "commit"), [(None, COMMIT), ("v1", OLDER), (OLDER, OLDER)])
def test_an_id_becomes_the_directory_of_a_commit(cache: Path, revision: str | None, commit: str) -> None:
    for download in (True, False):
        local = with_local_model(recipe_of("team/tiny", revision=revision), download)
        assert local.model == ModelConfig(str(cache / "snapshots" / commit))
        assert base_name(local.model.path) == "team/tiny"


@pytest.mark.parametrize("path", ["team/tiny", "tiny", "/team/tiny", "./team/tiny", "a/b/c", ""])
def test_directories_and_what_is_no_id_stay(
    cache: Path, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "team" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    recipe = recipe_of(path)
    assert with_local_model(recipe, download=True) is recipe


@pytest.mark.parametrize(
    ("path", "revision", "command"),
    [
        ("team/other", None, "hf download team/other`"),
        ("team/tiny", "v2", "hf download team/tiny --revision v2`"),
    ],
)
def test_what_is_not_in_the_cache(cache: Path, path: str, revision: str | None, command: str) -> None:
    recipe = recipe_of(path, revision=revision)
    with pytest.raises(
        ModelError, match=rf"^{path}: is no directory.*not in the cache .*hub .*HF_HUB_OFFLINE.*{command}"
    ):
        with_local_model(recipe, download=True)
    assert with_local_model(recipe, download=False) is recipe


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (GatedRepoError, r"accept the terms on https://huggingface\.co/team/other"),
        (RevisionNotFoundError, "has no branch, tag or commit 'v2': correct model.revision"),
        (RepositoryNotFoundError, "the hub has none of that name"),
    ],
)
def test_what_the_hub_refuses(
    cache: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception], message: str
) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise kind.__new__(kind)

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(ModelError, match=message):
        with_local_model(recipe_of("team/other", revision="v2"), download=True)


@pytest.mark.parametrize("pickles", [False, True])
def test_what_is_downloaded(cache: Path, monkeypatch: pytest.MonkeyPatch, pickles: bool) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(cache)

    monkeypatch.setattr(hub, "snapshot_download", download)
    with_local_model(recipe_of("team/tiny", revision="v1", allow_pickle=pickles), download=True)
    assert (asked["name"], asked["revision"], asked["local_files_only"]) == ("team/tiny", "v1", False)
    wanted = [
        "config.json",
        "tokenizer.model",
        "model-00001-of-00002.safetensors",
        "LICENSE",
        "modeling_own.py",
    ]
    pickled = ["pytorch_model.bin"]
    other = [
        "consolidated.safetensors",
        "original/params.json",
        "onnx/model.onnx",
        "model.gguf",
        "training_args.bin",
    ]
    patterns = {name: asked[name] for name in ("allow_patterns", "ignore_patterns")}
    kept = list(filter_repo_objects([*wanted, *pickled, *other], **patterns))
    assert kept == wanted + (pickled if pickles else [])


@pytest.fixture
def file(cache: Path, tmp_path: Path) -> Path:
    """A recipe with the model of the cache."""
    save(tiny_model("llama"), cache / "snapshots" / COMMIT)
    tiny_tokenizer().save_pretrained(cache / "snapshots" / COMMIT)
    lines = [(f"w{n} w{n + 1}", f"w{n + 2} w{n + 3}") for n in range(12)]
    content = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": "team/tiny"},
        "data": {
            "pairs": ["en-de"],
            "corpora": [{"path": str(write_jsonl(tmp_path / "train.jsonl", lines))}],
            "detect_examples": 2,
            "max_length": 64,
        },
        "select": {"layers": {"k": 1}},
        "deepspeed": str(Path(__file__).parents[2] / "ds_configs/270m/zero3.json"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(content))
    return path


def test_a_stage_runs_on_the_directory(file: Path, cache: Path, tmp_path: Path) -> None:
    assert main(["prepare", "--recipe", str(file)]) == 0
    resolved = load_recipe(tmp_path / "run" / "recipe.resolved.yaml")
    assert resolved.model == ModelConfig(str(cache / "snapshots" / COMMIT))


def test_a_missing_model_is_refused_where_it_is_needed(file: Path) -> None:
    recipe = load_recipe(file, ["model.path=team/other"])
    with pytest.raises(ConfigError, match=r"model\.path: team/other: is no directory, and as a hub id"):
        check_recipe(recipe, "prepare")
    with pytest.raises(ConfigError, match=r"model\.path: team/other does not exist; name a directory"):
        check_recipe(recipe, "prepare", download=False)
    assert check_recipe(replace(recipe, model=ModelConfig("team/other")), None).model.path == "team/other"
