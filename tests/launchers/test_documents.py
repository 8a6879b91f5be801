"""README and docs against the repository: links, file paths, recipe keys, recipe snippets, make targets."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lander_ds.cli.main import main
from lander_ds.config.explain import as_markdown, explain
from lander_ds.config.loading import load_recipe
from lander_ds.config.recipe import Recipe
from lander_ds.experiment.grid import load_experiment

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("ds_configs/**/*.md"),
        *ROOT.glob("examples/**/*.md"),
    ]
)
DIRECTORIES = (
    "lander_ds",
    "launchers",
    "docs",
    "recipes",
    "examples",
    "ds_configs",
    "benchmarks",
    "tests",
    ".ci",
)
SECTIONS = ("model", "data", "detect", "select", "routing", "train", "translate", "score", "export")

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PATH = re.compile(rf"(?<![\w/.-])(?:\./)?((?:{'|'.join(map(re.escape, DIRECTORIES))})/[\w./-]*\w)")
CODE = re.compile(r"`([^`\n]+)`")
KEY = re.compile(rf"((?:{'|'.join(SECTIONS)})(?:\.[a-z_]+)+)(?:[:=].*)?")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def anchors(document: Path) -> set[str]:
    """Names of the headings as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_relative_links_lead_somewhere(document: Path) -> None:
    for link in LINK.findall(document.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), f"{document.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{document.name}: {link}"


@each_document
def test_named_files_exist(document: Path) -> None:
    text = re.sub(r"https?://\S+", "", document.read_text(encoding="utf-8"))
    missing = [path for path in PATH.findall(text) if not (ROOT / path).exists()]
    assert missing == []


def has_key(cls: type, key: str) -> bool:
    """Whether a dotted key names a field of a configuration class."""
    name, _, rest = key.partition(".")
    hints = typing.get_type_hints(cls)
    if name not in hints:
        return False
    kind = hints[name]
    members = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    return not rest or any(dataclasses.is_dataclass(member) and has_key(member, rest) for member in members)  # type: ignore[arg-type]


@each_document
def test_named_recipe_keys_exist(document: Path) -> None:
    named = [
        match[1]
        for code in CODE.findall(document.read_text(encoding="utf-8"))
        if (match := KEY.fullmatch(code))
    ]
    # `train.en-de.jsonl` and the like are files.
    unknown = [
        key
        for key in named
        if not key.endswith((".json", ".jsonl", ".md", ".py")) and not has_key(Recipe, key)
    ]
    assert unknown == []


def test_the_key_check_knows_right_from_wrong() -> None:
    assert has_key(Recipe, "train.lr.general")
    assert not has_key(Recipe, "train.lr.generall")
    assert not has_key(Recipe, "train.steps.general")


def snippets(language: str) -> list[tuple[str, str]]:
    return [
        (document.name, body)
        for document in DOCUMENTS
        for kind, body in FENCE.findall(document.read_text(encoding="utf-8"))
        if kind == language
    ]


def test_recipe_snippets_load(tmp_path: Path) -> None:
    """The loaders refuse unknown keys and wrong types; what a snippet leaves out an example gives."""
    recipe = ("recipes/demo.yaml", load_recipe)
    kinds: dict[str, tuple[str, Callable[[Path], object]]] = {
        "experiments.md": ("experiments/tiny.yaml", load_experiment)
    }
    actual = snippets("yaml")
    assert actual
    for name, body in actual:
        example, load = kinds.get(name, recipe)
        complete = yaml.safe_load((ROOT / example).read_text(encoding="utf-8"))
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(complete | yaml.safe_load(body)), encoding="utf-8")
        load(path)


def test_named_commands_exist(capsys: pytest.CaptureFixture[str]) -> None:
    text = "\n".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    code = [*CODE.findall(text), *(line for _, body in FENCE.findall(text) for line in body.splitlines())]
    named = {
        command
        for line in code
        for command in re.findall(r"(?:^|&& |-m |--module )lander(?:_ds)? ([a-z]+)", line)
    }
    assert {"prepare", "train", "config", "summary"} <= named
    for command in named:
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0, command
    capsys.readouterr()


def test_the_page_of_recipe_keys_is_up_to_date() -> None:
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert page.strip() == as_markdown(explain()).strip(), (
        "run: lander config --explain --markdown > docs/recipe.md"
    )


def test_named_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {
        target
        for document in DOCUMENTS
        for target in re.findall(r"(?:^|`)make ([a-z]+)", document.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert named
    assert named <= targets


def test_the_licence_is_the_whole_apache_licence() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert text.lstrip().startswith("Apache License\n                           Version 2.0, January 2004")
    assert "9. Accepting Warranty or Additional Liability." in text
    assert "APPENDIX: How to apply the Apache License to your work." in text
