"""What reaches other hosts of the environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from lander_ds.cluster.doctor.environment import EXPORTED, read_environment_file, travelling
from lander_ds.cluster.doctor.finding import fails


def test_the_prefixes_are_those_of_deepspeed() -> None:
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
    from deepspeed.launcher.runner import EXPORT_ENVS

    assert set(EXPORTED) == {*EXPORT_ENVS, *CUDA_Accelerator.export_envs(None)}


def test_what_travels_and_what_stays(tmp_path: Path) -> None:
    here, home = tmp_path / "here", tmp_path / "home"
    here.mkdir()
    home.mkdir()
    (home / ".deepspeed_env").write_text("HF_HOME=/models\nOMP_NUM_THREADS=2\n")
    (here / ".deepspeed_env").write_text("HF_HOME=/shared\n")
    environment = {
        "HOME": str(home),
        "NCCL_DEBUG": "INFO",
        "PYTHONPATH": "/more",
        "GLOO_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": "2",
        "EDITOR": "ed",
    }
    actual = travelling(environment, here)
    assert actual.variables == {
        "NCCL_DEBUG": "INFO",
        "PYTHONPATH": f"{here}:/more",
        "HF_HOME": "/shared",
        "OMP_NUM_THREADS": "2",
    }
    assert [finding.status for finding in actual.findings] == ["warn"]
    assert "GLOO_SOCKET_IFNAME" in actual.findings[0].detail
    assert "OMP_NUM_THREADS" not in actual.findings[0].detail


def test_all_well(tmp_path: Path) -> None:
    actual = travelling({"HOME": str(tmp_path), "PATH": "/bin"}, tmp_path)
    assert [finding.status for finding in actual.findings] == ["ok"]


def test_a_file_of_another_name(tmp_path: Path) -> None:
    (tmp_path / "cluster.env").write_text("HF_HOME=/shared\n")
    actual = travelling({"HOME": str(tmp_path), "DS_ENV_FILE": str(tmp_path / "cluster.env")}, tmp_path)
    assert actual.variables["HF_HOME"] == "/shared"


@pytest.mark.parametrize(
    ("line", "wording"),
    [
        ("", "line 2: a blank line stops DeepSpeed's launcher"),
        ("# threads", "line 2: DeepSpeed knows no comments"),
        ("# OMP_NUM_THREADS=1", "line 2: DeepSpeed knows no comments"),
        ("OMP_NUM_THREADS", "line 2: 'OMP_NUM_THREADS' has no ="),
        ("export OMP_NUM_THREADS=1", "line 2: 'export OMP_NUM_THREADS' is no name"),
        ("OMP-THREADS=1", "line 2: 'OMP-THREADS' is no name"),
        ('NAME="quoted"', "line 2: the remote shell would change the value of NAME"),
        ("NAME=$HOME/x", "line 2: the remote shell would change the value of NAME"),
    ],
)
def test_faults_of_the_file_are_named_with_their_line(line: str, wording: str, tmp_path: Path) -> None:
    path = tmp_path / ".deepspeed_env"
    path.write_text(f"GOOD=1\n{line}\nALSO=a=b\n")
    variables, findings = read_environment_file(path)
    assert variables == {"GOOD": "1", "ALSO": "a=b"}
    assert fails(findings)
    assert [str(path) in finding.detail and wording in finding.detail for finding in findings] == [True]
    assert findings[0].cure
