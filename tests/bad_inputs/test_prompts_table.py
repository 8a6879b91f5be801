"""Prompts that a base model and its tokenizer cannot take, as the command line tells them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lander_ds.cli.main import main

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"

ROWS = [
    # The stage, the overrides, the exit code, what is said.
    (
        "config",
        "data.prompt.template='<bos>{src} in {tgt_name}:'",
        0,
        "puts in front of every text; it is put once",
    ),
    (
        "translate",
        "translate.shots=60",
        2,
        "translate.shots: 60 examples need at least",
        "model's 256 positions",
    ),
    ("config", "translate.shots=60", 2, "translate.shots: 60 examples need at least"),
    ("config", "translate={shots: 60, systems: [base]}", 0, "sound"),
    (
        "prepare",
        "data={pairs: [en-sr_Latn, en-sr_Cyrl], prompt: {template: '{src} {tgt_name}:'}, corpora: [{path: x}]}",
        2,
        "en-sr_Latn and en-sr_Cyrl get the same prompt",
        "data.prompt.language_names",
    ),
    ("train", "data.prompt.template='{src} ='", 2, "en-de and en-fr get the same prompt", "add {tgt_name}"),
]


@pytest.mark.parametrize(("stage", "override", "code", "messages"), [(*row[:3], row[3:]) for row in ROWS])
def test_what_is_said(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    override: str,
    code: int,
    messages: tuple[str, ...],
) -> None:
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("run"))
    monkeypatch.chdir(tmp_path)
    assert main([stage, "--recipe", "recipe.yaml", "--set", override]) == code
    captured = capsys.readouterr()
    said = " ".join((captured.out + captured.err).split())
    assert all(message in said for message in messages), said
    assert "Traceback" not in said


@pytest.mark.parametrize("key", ["max_position_embeddings", "n_positions", "seq_length"])
@pytest.mark.parametrize("nested", [False, True])
def test_examples_beyond_the_positions(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    key: str,
    nested: bool,
) -> None:
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("run"))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    del config["max_position_embeddings"]
    config = {"text_config": config | {key: 64}} if nested else config | {key: 64}
    path.write_text(json.dumps(config), encoding="utf-8")
    assert main(["train", "--recipe", "recipe.yaml"]) == 2
    said = " ".join("".join(capsys.readouterr()).split())
    assert "data.max_length: 96 is more than the model's 64 positions" in said
