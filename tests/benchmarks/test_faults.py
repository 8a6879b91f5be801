"""benchmarks/faults.py: what it is asked, what it finds out, and a small run of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from faults import is_good, main, parse, table
from injected import FAULTS, FILES
from miniature import RANKS, arguments, being_saved, differences, last_step, whole
from support.scripts import run_script
from support.tiny_run import TinyRun

from lander_ds.checkpoint.retention import Retention
from lander_ds.checkpoint.writer import Parts, Writer
from lander_ds.common.run_directory import RunDirectory

KEYS = [
    "kills",
    "kills_inside_save",
    "checkpoints_lost",
    "half_read",
    "final_weights_bitwise_equal",
    "injected_faults",
]
GOOD: dict[str, Any] = {
    "kills": 3,
    "kills_inside_save": 2,
    "checkpoints_lost": 0,
    "half_read": 0,
    "final_weights_bitwise_equal": True,
    "injected_faults": [{"fault": "full disk", "outcome": "exit code 74"}],
}


def test_every_fault_is_known_by_its_name() -> None:
    assert parse([]).faults == list(FAULTS)
    assert parse(["--faults", "none"]).faults == []
    assert parse(["--faults", "full disk,another base"]).faults == ["full disk", "another base"]
    assert {f"a flipped byte in {name}" for name in FILES} <= set(FAULTS)
    assert len(FILES) == 2 * RANKS + 2


@pytest.mark.parametrize("arguments", [["--kills", "0"], ["--faults", "flood"]])
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        {"checkpoints_lost": 1},
        {"half_read": 1},
        {"final_weights_bitwise_equal": False},
        {"injected_faults": [{"fault": "full disk", "outcome": "UNEXPECTED: exit code 1, not 74"}]},
    ],
)
def test_any_loss_is_bad(change: dict[str, Any]) -> None:
    assert is_good(GOOD)
    assert not is_good({**GOOD, **change})


def test_the_table_tells_everything() -> None:
    text = table(GOOD)
    assert all(key in text for key in KEYS if key != "injected_faults")
    assert "full disk\n    exit code 74" in text


def _save(run: RunDirectory, step: int, value: float) -> None:
    import torch

    writer = Writer(run.checkpoints, Retention(), background=False)
    state = {"progress": {"done": step}, "group_steps": {}}
    writer.save(step, Parts({"w": torch.full((2,), value)}, {"exp_avg/w": torch.ones(2)}), state, None)
    writer.finish()
    run.metrics.write_text(json.dumps({"step": step, "loss": value, "seconds": 1.0}) + "\n")


def test_differences_are_found(tmp_path: Path) -> None:
    one, other = RunDirectory(tmp_path / "one"), RunDirectory(tmp_path / "other")
    for run in (one, other):
        run.path.mkdir()
        _save(run, 3, 1.0)
    assert differences(one, other) == []
    _save(one, 4, 1.0)
    assert differences(one, other) == ["step", "progress", "metrics"]
    _save(other, 4, 1.0 + 2.0**-23)
    assert differences(one, other) == ["weights", "metrics"]


def test_what_lies_there_is_seen(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    assert (last_step(run), being_saved(run), whole(run)) == (0, [], {})
    run.path.mkdir()
    _save(run, 3, 1.0)
    _save(run, 4, 1.0)
    with run.metrics.open("a") as stream:
        stream.write('{"step": 5, "lo')
    (run.checkpoints / ".step-5.00ff.tmp").mkdir()
    (run.checkpoints / ".step-2.old.tmp").mkdir()
    (run.checkpoints / "step-3" / "trained-0.safetensors").write_bytes(b"")
    assert (last_step(run), being_saved(run), list(whole(run))) == (4, [".step-5.00ff.tmp"], [4])


def test_the_command_line_of_a_stage(tiny_run: TinyRun) -> None:
    run = RunDirectory(tiny_run.root / "some")
    actual = arguments(tiny_run, run, "deepspeed=$root/pipeline.json", stage="prepare")
    assert actual[:3] == ["prepare", "--recipe", str(tiny_run.recipe_path)]
    assert actual[3:] == [f"--set=run_dir={run.path}", f"--set=deepspeed={tiny_run.root}/pipeline.json"]


@pytest.mark.long
@pytest.mark.distributed
def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--kills", "2", "--launched", "0", "--json", "--keep", str(tmp_path / "kept")]
    chosen = ["--faults", "SIGTERM to one rank,a flipped byte in state.json,another base"]
    code = run_script(main, *options, *chosen)
    shown = capsys.readouterr()
    assert code == 0, shown.err
    actual = json.loads(shown.out)
    assert list(actual) == KEYS
    assert (actual["kills"], actual["checkpoints_lost"], actual["half_read"]) == (2, 0, 0)
    assert actual["kills_inside_save"] >= 1
    assert actual["final_weights_bitwise_equal"] is True
    outcomes = {entry["fault"]: entry["outcome"] for entry in actual["injected_faults"]}
    assert "exit code 75; resumed, bitwise equal" in outcomes["SIGTERM to one rank"]
    assert "resumed from step 4, bitwise equal" in outcomes["a flipped byte in state.json"]
    assert "base_fingerprint was sha256:" in outcomes["another base"]
    shutil.rmtree(tmp_path / "kept")
