"""The launchers for several hosts: help, refusals, and what of arguments and variables reaches a rank."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from supervise import FINAL

ROOT = Path(__file__).parents[2]
SCRIPTS = ("single.sh", "pdsh.sh", "openmpi.sh", "mpirun.sh")
SOURCED = ("cluster.sh", "mpi.sh", "rank.sh", "slurm.sbatch")
NASTY = ["train", "--set", "data.prompt.template={src} > \"$HOME\" 'x' ;*\n", "--set", "", "--force"]


def run(command: list[str], directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=directory,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A repository with nothing but launchers: there is no .venv that a script could use."""
    shutil.copytree(ROOT / "launchers", tmp_path / "launchers", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.mark.parametrize("script", [*SCRIPTS, *SOURCED])
def test_is_valid_bash(script: str) -> None:
    assert run(["bash", "-n", f"launchers/{script}"], ROOT).stderr == ""


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(clone: Path, script: str) -> None:
    result = run([f"launchers/{script}", "--help"], clone)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"usage: launchers/{script}")
    assert "--max-restarts" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "--hostfile is needed"),
        (["--hostfile", "missing", "train"], "--hostfile missing: no such file"),
        (["--hostfile=.", "train"], "--hostfile .: no such file"),
        (["--hostfile"], "--hostfile needs a value"),
        (["--hostfiel", "x", "train"], "unknown argument: --hostfiel"),
        (["--ranks", "2", "train"], "unknown argument: --ranks"),
        (["--max-restarts", "many", "train"], "--max-restarts many: must be a whole number"),
        (["--export", "NO_SUCH_VARIABLE", "train"], "--export NO_SUCH_VARIABLE: there is no such variable"),
        (["--hostfile", "good"], "no stage"),
    ],
)
def test_refuses_bad_arguments(clone: Path, arguments: list[str], message: str) -> None:
    (clone / "good").write_text("node1 slots=1\n")
    result = run(["launchers/pdsh.sh", *arguments], clone)
    assert result.returncode == 2
    assert message in result.stderr


@pytest.mark.parametrize("value", ["-1", "12.5", "soon", "2"])
def test_refuses_a_lease_that_is_no_time(clone: Path, value: str) -> None:
    result = run(["launchers/single.sh", "train"], clone, LANDER_LEASE_SECONDS=value)
    assert result.returncode == 2
    assert "LANDER_LEASE_SECONDS" in result.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no host"),
        ("# only a comment\n\n", "names no host"),
        ("node1 slots=1\nnode2\n", 'hosts:2: "node2" is not a host and its ranks'),
        ("node1 slots=0\n", "hosts:1: "),
        ("node1 slots=two\n", "hosts:1: "),
        ("node1 slots=1 max-slots=4\n", "hosts:1: "),
        ("node1 slots=1\n\nnode1 slots=2\n", "hosts:3: node1 stands there twice"),
    ],
)
@pytest.mark.parametrize("script", ["pdsh.sh", "openmpi.sh", "mpirun.sh"])
def test_refuses_a_bad_hostfile_by_line(clone: Path, script: str, text: str, message: str) -> None:
    (clone / "hosts").write_text(text)
    result = run([f"launchers/{script}", "--hostfile", "hosts", "train"], clone)
    assert result.returncode == 2
    assert message in result.stderr


def test_the_recipe_is_read_before_anything_is_started(tmp_path: Path) -> None:
    command = [str(ROOT / "launchers" / "single.sh"), "train", "--recipe", "missing.yaml"]
    result = run(command, tmp_path, LANDER_VENV=sys.prefix)
    assert result.returncode == 2
    assert "missing.yaml" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_slurm_starts_again_after_the_same_exit_codes_as_the_other_launchers() -> None:
    text = (ROOT / "launchers" / "slurm.sbatch").read_text(encoding="utf-8")
    final = re.search(r'^case "\$code" in\n +([\d |]+)\) ;;$', text, re.MULTILINE)
    assert final is not None
    assert tuple(map(int, final[1].split("|"))) == FINAL


def test_a_missing_environment_is_named(clone: Path) -> None:
    result = run(["launchers/single.sh", "train", "--recipe", "r.yaml"], clone)
    assert result.returncode == 2
    assert "run launchers/setup.sh on every host" in result.stderr


def open_launch(workspace: Path, prelude: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """What every launcher does before it starts ranks; prints the launch directory."""
    script = f"""
    set -euo pipefail
    source {ROOT}/launchers/env.sh; source {ROOT}/launchers/cluster.sh
    read_arguments "" "$@"
    {prelude}
    open_launch; printf '%s' "$LAUNCH"
    """
    command = ["bash", "-c", script, "probe", *NASTY[:1], "--recipe", "recipe.yaml", *NASTY[5:]]
    return run(command, workspace, LANDER_VENV=sys.prefix, HOME=str(workspace), **environment)


def rank(launch: Path, directory: Path, **environment: str) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment that rank.sh gives to Python, which only shows them."""
    python = directory / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text("#!/usr/bin/env bash\nprintf '%s\\0' \"$@\" VARIABLES; env --null\n")
    python.chmod(0o755)
    clean = {"PATH": os.environ["PATH"], "LANDER_VENV": str(python.parents[1]), **environment}
    result = subprocess.run(
        [ROOT / "launchers" / "rank.sh", launch],
        env=clean,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    arguments, _, variables = result.stdout.partition("\0VARIABLES\0")
    return arguments.split("\0"), dict(
        v.split("=", 1) for v in variables.rstrip("\0").split("\0") if "=" in v
    )


@pytest.fixture
def workspace_recipe(tmp_path: Path) -> Path:
    recipe = (ROOT / "recipes" / "demo.yaml").read_text(encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    return tmp_path


def test_variables_reach_the_ranks(workspace_recipe: Path) -> None:
    (workspace_recipe / ".deepspeed_env").write_text("\n# a comment\nNCCL_DEBUG=WARN\nMINE=a b\n  \n")
    given = {
        "NCCL_IB_HCA": "mlx5_0",
        "PYTHONUTF8": "1",
        "WANDB_NOTES": 'it\'s a "$note"; `x`\n',
        "OTHER": "stays",
        "WANTED": "goes",
        "DS_ENV_FILE": "not this",
        "MASTER_PORT": "12345",
    }
    opened = open_launch(workspace_recipe, "EXPORT=(WANTED)", **given)
    assert opened.returncode == 0, opened.stderr
    launch = Path(opened.stdout)
    assert launch.parent == workspace_recipe / "runs" / "demo" / "launch"
    assert (launch / "environment").stat().st_mode & 0o077 == 0
    _, variables = rank(launch, workspace_recipe, RANK="1", LOCAL_SIZE="2")
    for name in ("NCCL_IB_HCA", "PYTHONUTF8", "WANDB_NOTES", "WANTED", "MASTER_PORT"):
        assert variables[name] == given[name]
    assert (variables["NCCL_DEBUG"], variables["MINE"]) == ("WARN", "a b")
    assert not {"OTHER", "DS_ENV_FILE"} & variables.keys()
    assert variables["LANDER_LAUNCH"] == str(launch)


def test_another_virtual_environment_reaches_the_ranks(workspace_recipe: Path) -> None:
    launch = Path(open_launch(workspace_recipe).stdout)
    arguments, _ = rank(launch, workspace_recipe, RANK="0")
    own = str(workspace_recipe / "venv" / "bin" / "python")
    assert arguments[3] == own, "what a host says of itself counts more"
    environment = (launch / "environment").read_text().replace(sys.prefix, str(workspace_recipe / "venv"))
    (launch / "environment").write_text(environment)
    arguments, _ = rank(launch, workspace_recipe, RANK="0", LANDER_VENV="")
    assert arguments[3] == own


def test_a_bad_line_of_deepspeed_env_is_named(workspace_recipe: Path) -> None:
    (workspace_recipe / ".deepspeed_env").write_text("GOOD=1\nexport BAD=2\n")
    opened = open_launch(workspace_recipe)
    assert opened.returncode == 2
    assert '.deepspeed_env:2: "export BAD=2" is not KEY=VALUE' in opened.stderr


def test_a_path_that_other_shells_would_change_is_refused(workspace_recipe: Path) -> None:
    directory = workspace_recipe / "my runs"
    directory.mkdir()
    (workspace_recipe / "recipe.yaml").rename(directory / "recipe.yaml")
    opened = open_launch(directory, "HOSTS=(node1)")
    assert opened.returncode == 2
    assert "paths may have letters, digits" in opened.stderr
    assert open_launch(directory).returncode == 0, "on one machine it does no harm"


def test_arguments_reach_the_ranks_as_they_are(workspace_recipe: Path) -> None:
    launch = Path(open_launch(workspace_recipe).stdout)
    (launch / "arguments").write_text("".join(f"{argument}\0" for argument in NASTY))
    arguments, _ = rank(launch, workspace_recipe, RANK="3")
    assert arguments[1:3] == [str(launch), "3"]
    assert arguments[4:] == ["-u", "-m", "lander_ds", *NASTY]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {
                "SLURM_PROCID": "3",
                "SLURM_LOCALID": "1",
                "SLURM_NTASKS": "4",
                "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
            },
            {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"},
        ),
        # mpirun inside a SLURM job: what SLURM says is about mpirun's daemons.
        (
            {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2", "OMPI_COMM_WORLD_RANK": "5"},
            {"RANK": "", "WORLD_SIZE": ""},
        ),
        # deepspeed --no_ssh inside a SLURM job.
        (
            {"RANK": "7", "WORLD_SIZE": "8", "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "LOCAL_SIZE": "4"},
            {"RANK": "7", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"},
        ),
    ],
)
def test_ranks_of_each_launcher(
    workspace_recipe: Path, given: dict[str, str], expected: dict[str, str]
) -> None:
    launch = Path(open_launch(workspace_recipe).stdout)
    arguments, variables = rank(launch, workspace_recipe, **given)
    assert {name: variables.get(name, "") for name in expected} == expected
    assert arguments[2] == (given.get("OMPI_COMM_WORLD_RANK") or expected["RANK"])
    assert int(variables["OMP_NUM_THREADS"]) >= 1


def test_a_launch_directory_that_is_not_shared_is_named(tmp_path: Path) -> None:
    result = run([str(ROOT / "launchers" / "rank.sh"), str(tmp_path / "elsewhere")], tmp_path)
    assert result.returncode == 2
    assert "run_dir must be shared by all hosts" in result.stderr
