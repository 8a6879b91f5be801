"""`lander init`: a recipe that is sound as it stands, for every size; and what it refuses before it writes anything."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from support.tiny_models import save_roomy
from support.tiny_run import SAMPLE

from lander_ds.cli.main import main
from lander_ds.common.shipped import SIZES
from lander_ds.config.loading import load_recipe
from lander_ds.config.starter import Wish, nearest_size, starter

ROOT = Path(__file__).parents[2]


def flags(directory: Path, **changes: str) -> list[str]:
    """Of a sound call."""
    given = {
        "model": str(directory / "model"),
        "pairs": "en-de,en-fr",
        **{split: f"{SAMPLE}/{split}.{{pair}}.jsonl" for split in ("train", "valid", "test")},
        "output": str(directory / "mine.yaml"),
        **changes,
    }
    return ["init", *(part for name, value in given.items() for part in (f"--{name}", value))]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model."""
    directory = tmp_path_factory.mktemp("init")
    save_roomy(directory / "model")
    return directory


@pytest.fixture
def place(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of its own with that model."""
    (tmp_path / "model").symlink_to(workspace / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()} - {"model"}


def test_it_is_sound_and_says_what_comes_next(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags(place)) == 0
    assert f"lander all --recipe {place / 'mine.yaml'}" in capsys.readouterr().out
    assert files(place) == {"mine.yaml", "mine.zero3.json"}
    recipe = load_recipe(place / "mine.yaml")
    assert (recipe.model.path, recipe.data.pairs) == (str(place / "model"), ("en-de", "en-fr"))
    assert [corpus.split for corpus in recipe.data.corpora] == ["train", "valid", "test"]
    assert (recipe.run_dir, recipe.deepspeed) == ("runs/mine", str(place / "mine.zero3.json"))
    shipped = ROOT / "ds_configs" / "270m" / "zero3.json"
    assert (place / "mine.zero3.json").read_bytes() == shipped.read_bytes()
    assert main(["config", "--recipe", str(place / "mine.yaml")]) == 0


def test_flags(place: Path) -> None:
    own = flags(place, size="7b", topology="replicated", **{"run-dir": "elsewhere/it's: #1"})
    assert main([*own, "--train", f"{SAMPLE}/valid.{{pair}}.jsonl"]) == 2, "twice used"
    assert files(place) == set()
    assert main(own) == 0
    recipe = load_recipe(place / "mine.yaml")
    assert (recipe.topology, recipe.run_dir) == ("replicated", "elsewhere/it's: #1")
    assert (place / "mine.replicated.json").read_bytes() == (
        ROOT / "ds_configs" / "7b" / "replicated.json"
    ).read_bytes()


@pytest.mark.parametrize("size", SIZES)
def test_every_size_has_comments_and_all_that_was_wished_for(size: str, tmp_path: Path) -> None:
    wish = Wish(
        "a/model",
        ("no-en", "en-zh_Hans"),
        (("train", "a {pair}.jsonl"), ("train", "b.tsv"), ("valid", 'c"\\'), ("test", "d")),
        "my runs/1",
        "zero3",
    )
    text = starter(size, wish, "mine.yaml", "mine.json")
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    actual, shipped = load_recipe(path), load_recipe(ROOT / "recipes" / f"{size}.yaml")
    assert (actual.model.path, actual.data.pairs) == (wish.model, wish.pairs)
    assert tuple((corpus.split, corpus.path) for corpus in actual.data.corpora) == wish.corpora
    assert (actual.run_dir, actual.deepspeed, actual.topology) == ("my runs/1", "mine.json", "zero3")
    assert (actual.train, actual.select, actual.translate) == (
        shipped.train,
        shipped.select,
        shipped.translate,
    )
    assert len(re.findall("#", text)) > 15
    for stranger in ("examples/", "models/", "ds_configs/", f"recipes/{size}"):
        assert stranger not in text
    assert yaml.safe_load(text)


def test_the_sizes_are_those_of_the_repository() -> None:
    assert set(SIZES) == {path.name for path in (ROOT / "ds_configs").iterdir() if path.is_dir()}
    assert set(SIZES) | {"demo"} == {path.stem for path in (ROOT / "recipes").glob("*.yaml")}


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [(1, "270m"), (268_000_000, "270m"), (1_500_000_000, "1b"), (8_000_000_000, "7b"), (10**12, "176b")],
)
def test_the_nearest_size(parameters: int, expected: str) -> None:
    assert nearest_size(parameters) == expected


@pytest.mark.parametrize("name", ["mine.yaml", "mine.zero3.json"])
def test_nothing_is_overwritten(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / name).write_text("kept")
    assert main(flags(place)) == 2
    assert f"{place / name} exists: move it away, or name another file" in capsys.readouterr().err
    assert files(place) == {name}
    assert (place / name).read_text() == "kept"


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        (
            {"train": "missing.{pair}.jsonl"},
            ["mine.yaml (not written), line", "data.corpora.0", "missing.en-de.jsonl"],
        ),
        ({"pairs": "en_de"}, ["data.pairs.0: 'en_de' is no pair"]),
        ({"model": "nowhere/at/all"}, ["nowhere/at/all"]),
        ({"model": "owner/name"}, ["--model owner/name: of a hub id say the size, too: --size 7b"]),
        ({"output": "no/such/mine.yaml"}, ["there is no directory no/such: make it"]),
        ({"size": "70b", "topology": "replicated"}, ["--topology replicated: does not fit models of 70b"]),
    ],
)
def test_what_cannot_work_is_refused_and_nothing_is_written(
    changes: dict[str, str], fragments: Sequence[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(place, **changes)) == 2
    message = capsys.readouterr().err
    for fragment in fragments:
        assert fragment in message
    assert "Traceback" not in message
    assert files(place) == set()


def test_a_hub_id_needs_no_download(place: Path) -> None:
    assert main(flags(place, model="owner/name", size="1b")) == 0
    assert load_recipe(place / "mine.yaml").model.path == "owner/name"
    assert json.loads((place / "mine.zero3.json").read_text())["zero_optimization"]["stage"] == 3
