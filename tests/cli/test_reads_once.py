"""A command reads what its stages need once: the DeepSpeed JSON, and the base model for its fingerprint."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from support.tiny_run import TinyRun
from support.workspace import Workspace

from lander_ds.cli import stages
from lander_ds.cli.main import main
from lander_ds.distributed.start import Start
from lander_ds.stages.catalogue import STAGES
from lander_ds.stages.stage import Stage

ROOT = Path(__file__).parents[2]
READERS = {
    "lander_ds.config.deepspeed_strict": "read_deepspeed_json",
    "lander_ds.models.weights": "base_fingerprint",
}
PROGRAM = """\
import sys
from importlib import import_module

def note_calls(module, name):
    function = getattr(module, name)

    def noted(*arguments):
        with open(sys.argv[1], "a") as calls:
            calls.write(f"{name}\\n")
        return function(*arguments)

    setattr(module, name, noted)

# Before anything else imports them by name.
for module, name in READERS.items():
    note_calls(import_module(module), name)

from lander_ds.cli.main import main

sys.exit(main(sys.argv[2:]))
"""


def calls(run: TinyRun, name: str, command: str, *overrides: str) -> dict[str, int]:
    """How often one process, `lander COMMAND`, reads what."""
    notes = run.root / f"{name}-{command}-calls"
    notes.unlink(missing_ok=True)
    sets = [f"--set={override}" for override in (f"run_dir={run.root / name}", *overrides)]
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"READERS = {READERS}\n{PROGRAM}",
            notes,
            command,
            "--recipe",
            run.recipe_path,
            *sets,
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={
            **{key: value for key, value in os.environ.items() if key not in launched},
            "PYTHONPATH": str(ROOT),
        },
    )
    assert done.returncode == 0, done.stderr
    return dict(Counter(notes.read_text().split()))


@pytest.mark.parametrize("command", ["detect", "train"])
def test_a_stage_reads_once(tiny_run: TinyRun, command: str) -> None:
    tiny_run.run("reads-once")
    assert calls(tiny_run, "reads-once", command, "train.steps=1", "select.layers.k=2") == dict.fromkeys(
        READERS.values(), 1
    )


def test_all_stages_are_given_the_same_start(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    # One process alone would otherwise open a group for `all`, which only the stages themselves need.
    monkeypatch.setattr(stages, "_open_process_group", lambda start, command, words: None)
    starts: list[Start] = []
    monkeypatch.setattr(Stage, "perform", lambda self, start: starts.append(start))
    assert main(["all", "--recipe", "recipe.yaml", "--force"]) == 0
    assert len(starts) == len(STAGES)
    assert all(start is starts[0] for start in starts)
    assert starts[0].force
