"""launchers/pytorchjob.yaml against torchrun's and this package's command lines, and run as the operator would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.tiny_run import TinyRun
from torch.distributed.run import get_args_parser

from lander_ds.cli.parser import make_parser
from lander_ds.config.loading import load_recipe
from lander_ds.distributed.process_group import free_port

ROOT = Path(__file__).parents[2]
JOB: dict[str, Any] = yaml.safe_load((ROOT / "launchers" / "pytorchjob.yaml").read_text(encoding="utf-8"))
REPLICAS: dict[str, Any] = JOB["spec"]["pytorchReplicaSpecs"]


def container(replica: str) -> dict[str, Any]:
    (actual,) = REPLICAS[replica]["template"]["spec"]["containers"]
    assert actual["name"] == "pytorch", "the operator looks for this name"
    return dict(actual)


def split(command: list[str]) -> tuple[list[str], list[str]]:
    """Up to launchers/rank.sh and its LAUNCH_DIR, and the arguments of lander_ds."""
    at = command.index("launchers/rank.sh")
    assert command[at + 1] == "-"
    return command[: at + 2], command[at + 2 :]


def test_kinds_that_the_operator_knows() -> None:
    assert (JOB["apiVersion"], JOB["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert set(REPLICAS) == {"Master", "Worker"}
    assert REPLICAS["Master"]["replicas"] == 1
    # ExitCode would not start again after 75 and 76.
    assert {replica["restartPolicy"] for replica in REPLICAS.values()} == {"OnFailure"}
    gpus = {container(name)["resources"]["limits"]["nvidia.com/gpu"] for name in REPLICAS}
    assert gpus == {int(JOB["spec"]["nprocPerNode"])}


@pytest.mark.parametrize("replica", sorted(REPLICAS))
def test_the_command_is_one_that_torchrun_and_lander_know(replica: str) -> None:
    command = container(replica)["command"]
    before, arguments = split(command)
    assert before[0] == "torchrun"
    known = get_args_parser().parse_args([*before[1:], *arguments])
    assert (known.training_script, known.no_python) == ("launchers/rank.sh", True)
    assert os.access(ROOT / known.training_script, os.X_OK)
    options = make_parser().parse_args(arguments)
    assert options.auto_resume
    load_recipe(ROOT / options.recipe, options.overrides)


@pytest.mark.parametrize("replica", sorted(REPLICAS))
def test_volumes_and_variables(replica: str) -> None:
    actual = container(replica)
    volumes = {volume["name"] for volume in REPLICAS[replica]["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in actual["volumeMounts"]} == volumes
    variables = {entry["name"]: entry["value"] for entry in actual["env"]}
    assert variables["PATH"].startswith(f"{variables['LANDER_VENV']}/bin:")
    assert all(isinstance(value, str) for value in variables.values())
    # What the operator and torchrun set must not be set here.
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} & variables.keys()


@pytest.mark.distributed
def test_two_pods_train(tiny_run: TinyRun) -> None:
    """The command of the file, with the variables that the operator sets, for another recipe."""
    run = tiny_run.run("pods")
    arguments = [
        *("train", "--recipe", str(tiny_run.recipe_path), "--set", f"run_dir={run.path}"),
        *("--set", "select.layers.k=2", "--set", "train.steps=2", "--auto-resume"),
    ]
    port = str(free_port())
    pods = []
    for number, replica in enumerate(("Master", "Worker")):
        before, _ = split(container(replica)["command"])
        operator = {
            "PET_NNODES": "2",
            "PET_NPROC_PER_NODE": "1",
            "PET_NODE_RANK": str(number),
            "PET_MASTER_ADDR": "127.0.0.1",
            "PET_MASTER_PORT": port,
        }
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GLOO")}
        own = {
            "LANDER_VENV": sys.prefix,
            "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }
        pods.append(
            subprocess.Popen(
                [*before, *arguments],
                cwd=ROOT,
                env={**environment, **own, **operator},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                stdin=subprocess.DEVNULL,
            )
        )
    try:
        outputs = [pod.communicate(timeout=200)[0] for pod in pods]
    finally:
        for pod in pods:
            pod.terminate()
    assert [pod.returncode for pod in pods] == [0, 0], outputs
    assert len(run.metrics.read_text(encoding="utf-8").splitlines()) >= 2
