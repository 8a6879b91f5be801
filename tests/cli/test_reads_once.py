"""A command reads what its stages need once: the DeepSpeed JSON, and the base model for its fingerprint."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from support.commands import Command
from support.tiny_run import TinyRun
from support.workspace import Workspace

from lander_ds.cli import stages
from lander_ds.cli.main import main
from lander_ds.distributed.start import Start
from lander_ds.stages.catalogue import STAGES
from lander_ds.stages.stage import Stage

READERS = {
    "lander_ds.config.deepspeed_strict": "read_deepspeed_json",
    "lander_ds.models.weights": "base_fingerprint",
}
NOTES = "READERS_NOTES"


def note_calls() -> None:
    """Let the readers note that they are called, under whatever name a module of this package knows them."""
    for module, name in READERS.items():
        _note_calls_of(getattr(import_module(module), name))


def _note_calls_of(function: Callable[..., Any]) -> None:
    def noted(*arguments: Any) -> Any:
        with Path(os.environ[NOTES]).open("a") as calls:
            calls.write(f"{function.__name__}\n")
        return function(*arguments)

    for name, module in list(sys.modules.items()):
        if name.startswith("lander_ds."):
            for key, value in list(vars(module).items()):
                if value is function:
                    setattr(module, key, noted)


def calls(run: TinyRun, name: str, command: str, *overrides: str) -> dict[str, int]:
    """How often one process, `lander COMMAND`, reads what."""
    notes = run.root / f"{name}-{command}-calls"
    sets = [f"--set={override}" for override in (f"run_dir={run.root / name}", *overrides)]
    arguments = [command, "--recipe", str(run.recipe_path), *sets]
    ended = Command(arguments, run.root, {NOTES: str(notes)}, before=note_calls).wait()
    assert ended.code == 0, ended.errors
    return dict(Counter(notes.read_text().split()))


def test_a_stage_reads_once(tiny_run: TinyRun) -> None:
    tiny_run.run("reads-once")
    sets = ("train.steps=1", "select.layers.k=2", "export.formats=[dense, delta]")
    for command in ("detect", "train"):
        assert calls(tiny_run, "reads-once", command, *sets) == dict.fromkeys(READERS.values(), 1), command
    assert calls(tiny_run, "reads-once", "export", *sets)["base_fingerprint"] == 1


def test_all_stages_are_given_the_same_start(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    # One process alone would otherwise open a group for `all`, which only the stages themselves need.
    monkeypatch.setattr(stages, "_open_process_group", lambda start, command, words: None)
    starts: list[Start] = []
    monkeypatch.setattr(Stage, "perform", lambda self, start: starts.append(start))
    assert main(["all", "--recipe", "recipe.yaml", "--force"]) == 0
    assert len(starts) == len(STAGES)
    assert all(start is starts[0] for start in starts)
    assert starts[0].force
