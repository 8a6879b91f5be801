"""The command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path

import pytest
from support.commands import Command
from support.workspace import Workspace

from lander_ds.cli.main import main
from lander_ds.common.errors import DataError
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.loading import load_recipe
from lander_ds.distributed import vectors
from lander_ds.distributed.start import Start
from lander_ds.stages import score
from lander_ds.stages.catalogue import STAGES
from lander_ds.version import __version__

ROOT = Path(__file__).parents[2]


def lander(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m lander_ds` in a process of its own."""
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    return subprocess.run(
        [sys.executable, "-m", "lander_ds", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=cwd,
        env={**inherited, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
    )


def test_help_names_every_command_and_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for name in [*STAGES, "all", "config", "summary", "tokenizer"]:
        assert f"\n  {name} " in shown


@pytest.mark.parametrize("command", [*STAGES, "all", "config", "summary", "tokenizer"])
def test_help_of_every_command_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"example:\n  lander {command} " in capsys.readouterr().out


def test_light_commands_import_nothing_heavy() -> None:
    heavy = ("torch", "deepspeed", "transformers", "datasets", "pyarrow")
    code = (
        "import sys; from lander_ds.cli.main import main; main(['config', '--explain']);"
        f"sys.exit(len([name for name in {heavy} if name in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["trian", "--recipe", "r"],
        ["train"],
        ["train", "--recipe"],
        ["config"],
        ["summary"],
        ["tokenizer", "--out", "d"],
    ],
)
def test_wrong_usage_ends_with_2(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: lander" in capsys.readouterr().err


def test_dump_is_pure_yaml_on_standard_output(workspace: Workspace) -> None:
    done = lander("config", "--recipe", "recipe.yaml", "--set", "seed=7", "--dump", cwd=workspace.path)
    assert (done.returncode, done.stderr) == (0, "")
    (workspace.path / "again.yaml").write_text(done.stdout)
    assert load_recipe(workspace.path / "again.yaml") == load_recipe(workspace.recipe, ["seed=7"])


def test_config_checks_the_json_too(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--recipe", "recipe.yaml"]) == 0
    assert "recipe.yaml: sound" in capsys.readouterr().out
    workspace.write_deepspeed(zero_optimization={"stagee": 3})
    assert main(["config", "--recipe", "recipe.yaml", "--dump"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "did you mean zero_optimization.stage?" in shown.err


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--explain", "train.clip"]) == 0
    assert capsys.readouterr().out.startswith("train.clip: number, at least 0 = 1.0\n")
    assert main(["config", "--explain", "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("# Recipe keys\n")
    assert main(["config", "--explain", "train.clipp"]) == 2
    assert "did you mean train.clip?" in capsys.readouterr().err


def test_the_local_rank_of_the_launcher_is_taken(workspace: Workspace) -> None:
    assert main(["--local_rank=0", "config", "--recipe", "recipe.yaml"]) == 0


def test_a_stage_runs_on_the_resolved_recipe(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, bool]] = []
    monkeypatch.setattr(
        score.STAGE, "_parts", lambda start: (ran.append((start.recipe.run_dir, start.force)), [])[1]
    )
    assert main(["score", "--recipe", "recipe.yaml", "--set", "run_dir=other", "--force"]) == 0
    assert ran == [("other", True)]
    written = load_recipe(workspace.path / "other" / "recipe.resolved.yaml")
    assert written == load_recipe(workspace.recipe, ["run_dir=other"])


def test_all_runs_every_stage_in_order_in_one_group(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch.distributed as dist

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    ran: list[tuple[str, bool, bool]] = []
    for stage in STAGES:
        monkeypatch.setattr(
            import_module(f"lander_ds.stages.{stage}").STAGE,
            "perform",
            lambda start, stage=stage: ran.append((stage, dist.is_initialized(), start.auto_resume)),
        )
    try:
        assert main(["all", "--recipe", "recipe.yaml", "--auto-resume"]) == 0
    finally:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
    assert ran == [(stage, True, True) for stage in STAGES]
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("stage", "dtype", "advised"),
    [("translate", "bfloat16", True), ("translate", "float32", False), ("score", "bfloat16", False)],
)
def test_a_processor_that_imitates_the_type_is_told(
    workspace: Workspace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stage: str,
    dtype: str,
    advised: bool,
) -> None:
    monkeypatch.setattr(vectors, "widest", lambda: "AVX2")
    monkeypatch.setattr("lander_ds.cli.stages.process_group_for", lambda *_: nullcontext())
    monkeypatch.setattr(import_module(f"lander_ds.stages.{stage}").STAGE, "perform", lambda start: None)
    assert main([stage, "--recipe", "recipe.yaml", "--set", f"model.dtype={dtype}"]) == 0
    assert ("set model.dtype=float32" in capsys.readouterr().err) is advised


def test_errors_of_a_stage(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(error: BaseException) -> None:
        def perform(start: Start) -> None:
            raise error

        monkeypatch.setattr(score.STAGE, "perform", perform)

    fail(DataError("corpus.txt, line 3: broken; repair it"))
    assert main(["score", "--recipe", "recipe.yaml"]) == 2
    assert capsys.readouterr().err == "error: corpus.txt, line 3: broken; repair it\n"
    fail(KeyboardInterrupt())
    assert main(["score", "--recipe", "recipe.yaml"]) == 130
    fail(ZeroDivisionError("a defect"))
    with pytest.raises(ZeroDivisionError):
        main(["score", "--recipe", "recipe.yaml"])


def test_a_reader_that_leaves_is_no_error(workspace: Workspace) -> None:
    command = f"{sys.executable} -m lander_ds config --explain | head -n 1"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
    )
    assert (done.stdout, done.stderr) == ("run_dir: text (required)\n", "")


def test_summary_of_a_directory_that_is_no_run(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["summary", "nowhere", "--json"]) == 2
    shown = capsys.readouterr()
    assert "nowhere" in shown.err
    assert "Traceback" not in shown.err


def test_summary_json_is_json_alone(workspace: Workspace) -> None:
    RunDirectory(workspace.path / "run").record("prepare", {}, {}, [], 2.0)
    done = lander("summary", "run", "--json", cwd=workspace.path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["stage_seconds"] == {"prepare": 2.0}


def test_tokenizer(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    sample = ROOT / "examples" / "sample" / "train.{pair}.jsonl"
    arguments = [
        "tokenizer",
        "--recipe",
        "recipe.yaml",
        "--out",
        "tok",
        "--set",
        f"data.corpora.0.path={sample}",
    ]
    assert (
        main([*arguments, "--vocab-size", "900", "--set", "model.path=none", "--set", "deepspeed=none"]) == 0
    )
    assert (workspace.path / "tok" / "tokenizer.model").exists()
    assert main([*arguments, "--vocab-size", "900"]) == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.distributed
def test_under_the_launcher_a_mistake_is_told_once(workspace: Workspace) -> None:
    launcher = Path(sys.executable).with_name("deepspeed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [launcher, "--num_gpus", "2", "--master_port", str(port), "--module", "lander_ds", "train"]
    done = subprocess.run(
        [*map(str, command), "--recipe", "recipe.yaml", "--set", "train.steps=0", "--set", "train.clip=-1"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2
    assert done.stderr.count("error: recipe.yaml has 2 problems") == 1
    assert "train.clip: must be at least 0, found -1.0" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.distributed
def test_one_failing_rank_ends_at_once_and_tells_its_story(workspace: Workspace) -> None:
    environment = {
        "WORLD_SIZE": "2",
        "RANK": "1",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    arguments = ["train", "--recipe", "recipe.yaml", "--set", "train.steps=0"]
    done = Command(arguments, workspace.path, environment).wait()
    assert done.code == 2
    assert "rank 1 stopped: " in done.errors.replace("\n", " ")
    assert "Traceback" not in done.errors


def test_a_tilde_is_the_home_directory(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    overrides = [
        "run_dir=~/x",
        "data.cache_dir=~/c",
        "score.baseline=~/b.{pair}",
        "deepspeed=~/z.json",
        "model.path=~/m",
    ]
    recipe = load_recipe(workspace.recipe, [*overrides, "data.corpora.0.path=~/t.{pair}"])
    assert recipe.run_dir == "/home/somebody/x"
    assert recipe.data.cache_dir == "/home/somebody/c"
    assert recipe.score.baseline == "/home/somebody/b.{pair}"
    assert recipe.deepspeed == "/home/somebody/z.json"
    assert recipe.model.path == "/home/somebody/m"
    assert recipe.data.corpora[0].path == "/home/somebody/t.{pair}"
