"""`lander doctor` with real probes, real ranks and real faults: two hosts behind a stand-in for ssh, and real sshd."""

from __future__ import annotations

import getpass
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fake_hosts import FakeHosts, exit_code, failed, files, replacing, write_model
from support.workspace import Workspace

from lander_ds.distributed.process_group import free_port

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"

pytestmark = pytest.mark.distributed


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """The command line sends log lines to a standard error that is gone after the test."""
    root = logging.getLogger()
    handlers = root.handlers[:]
    yield
    root.handlers[:] = handlers


@pytest.fixture
def hosts(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHosts]:
    """Two sound hosts, one and two; afterwards nothing of them may be left."""
    actual = FakeHosts(workspace, tmp_path_factory.mktemp("cluster") / "hosts")
    yield actual
    deadline = time.monotonic() + 60.0
    while actual.processes_left() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert actual.processes_left() == []


def test_two_sound_hosts_are_ready_and_measured(hosts: FakeHosts, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(hosts.workspace.path)
    code, report = hosts.doctor(capsys, "--master-port", str(free_port()), "--master-addr", "127.0.0.1")
    assert failed(report) == {}
    assert (code, report["verdict"]) == (0, "ok")
    bandwidth = report["bandwidth"]
    assert (bandwidth["backend"], bandwidth["ranks"]) == ("gloo", 2)
    assert bandwidth["all_reduce"]["bytes_per_second"] > 1e6
    messages = bandwidth["point_to_point"]
    assert [(message["from"], message["to"]) for message in messages] == [("one", "two")]
    assert 0 < messages[0]["latency_seconds"] < 1
    assert {"hostfile", "ssh", "clock", "packages", "code", "model", "run_dir", "disk", "rendezvous"} <= {
        check["check"] for check in report["checks"]
    }
    assert set(report["checks"][0]) == {"check", "host", "status", "detail", "cure"}
    # Run directory and tokens were made and have gone again.
    assert files(hosts.workspace.path) == before


def test_faults_of_one_host_are_all_named_and_one_that_is_gone_hinders_nobody(
    hosts: FakeHosts, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = hosts.workspace
    other = hosts.other_directory("other")
    (other / "recipe.yaml").write_text(workspace.recipe.read_text().replace("steps: 10", "steps: 11"))
    (other / "zero3.json").write_text(workspace.deepspeed.read_text().replace("false", "true"))
    write_model(other / "model", seed=1)
    python = hosts.broken_python("python", clock=100.0, package="transformers-4.0.0")
    hosts.set_up(
        "two",
        f"{replacing(workspace.path, other)}\n"
        f"export PYTHONPATH={python} GLOO_SOCKET_IFNAME=nope0\nulimit -n 200",
    )
    hosts.set_up("gone", "echo 'ssh: connect to host gone port 22: No route to host' >&2; exit 255")
    hosts.name("one", "gone", "two")
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        code, report = hosts.doctor(capsys, "--master-port", str(taken.getsockname()[1]))
    assert (code, report["verdict"]) == (2, "fail")
    assert failed(report) == {
        "one": {"rendezvous"},
        "gone": {"ssh"},
        "two": {
            "clock",
            "code",
            "deepspeed_json",
            "interface",
            "model",
            "open_files",
            "packages",
            "recipe",
            "run_dir",
        },
    }
    wording = {check["check"]: check["detail"] for check in report["checks"] if check["status"] == "fail"}
    assert "transformers is 4.0.0" in wording["packages"]
    assert "train.steps is 11, on one 10" in wording["recipe"]
    assert "run.py" in wording["code"]
    assert f"{other / 'run'} is another directory than {workspace.path / 'run'} on one" in wording["run_dir"]
    assert "Address already in use" in wording["rendezvous"]
    assert "100.0" in wording["clock"]
    assert report["bandwidth"] == {}


def test_hosts_that_do_not_answer_are_named_and_the_rest_goes_on(
    hosts: FakeHosts, capsys: pytest.CaptureFixture[str]
) -> None:
    ssh = "echo 'ssh: {}' >&2; exit 255"
    scripts = {
        "refused": ssh.format("connect to host refused port 22: Connection refused"),
        "unknown": ssh.format("Could not resolve hostname unknown: Name or service not known"),
        "denied": ssh.format("root@denied: Permission denied (publickey,password)."),
        "newkey": ssh.format("Host key verification failed."),
        "elsewhere": replacing(hosts.workspace.path, "/nonexistent"),
        "nopython": replacing(sys.executable, "/nonexistent/python"),
        "nocode": replacing("lander_ds.cluster.doctor.probe", "lander_ds.cluster.doctor.gone"),
        "crashes": replacing("-m lander_ds.cluster.doctor.probe", "-c 1/0"),
        "hangs": "command='sleep 300'",
    }
    for name, script in scripts.items():
        hosts.set_up(name, script)
    hosts.name(*scripts)
    code, report = hosts.doctor(capsys, "--timeout", "20")
    assert code == 2
    assert failed(report) == {
        "refused": {"ssh"},
        "unknown": {"ssh"},
        "denied": {"ssh"},
        "newkey": {"ssh"},
        "elsewhere": {"directory"},
        "nopython": {"interpreter"},
        "nocode": {"code"},
        "crashes": {"probe"},
        "hangs": {"ssh"},
    }
    wording = {check["host"]: check for check in report["checks"]}
    assert "no answer to 'hello' within 20 s" in wording["hangs"]["detail"]
    assert "ssh-keyscan" in wording["newkey"]["cure"]
    assert wording["elsewhere"]["detail"] == f"{hosts.workspace.path} is no directory there"


def test_nothing_outlives_a_doctor_that_is_killed(hosts: FakeHosts) -> None:
    command = [sys.executable, "-m", "lander_ds", "doctor", "--recipe", "recipe.yaml", "--hostfile"]
    process = subprocess.Popen(
        [*command, str(hosts.hostfile), "--ssh", str(hosts.ssh), "--launcher", "ssh"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60.0
    while len(hosts.processes_left()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(hosts.processes_left()) >= 2
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_missing_hostfile_fails(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["doctor", "--recipe", "recipe.yaml", "--hostfile", "nowhere"]) == 2
    shown = capsys.readouterr().out
    assert "nowhere does not exist" in shown
    assert "cure: create it" in shown
    assert "verdict: not ready; checks failed: 1" in shown


def test_this_machine_alone(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(workspace.path / "model")
    command = ["doctor", "--recipe", "recipe.yaml", "--master-port", str(free_port())]
    assert exit_code(command) == 0
    shown = capsys.readouterr().out
    assert "verdict: ready; " in shown
    assert "all-reduce over 2 ranks (gloo): " in shown
    assert "rank 0 to rank 1: " in shown


def test_a_recipe_that_is_wrong_does_not_hide_the_rest(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.recipe.write_text("run_dir: [\n")
    command = ["doctor", "--recipe", "recipe.yaml", "--ranks", "1", "--master-port", str(free_port())]
    assert exit_code(command) == 2
    shown = capsys.readouterr().out
    assert "recipe.yaml, line" in shown
    assert "1 ranks add up correctly" in shown
    assert "checks failed: 1" in shown


@pytest.fixture
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """A real sshd on a free port with keys of its own: the ssh command for it, and the port."""
    if os.geteuid() != 0 or not Path(SSHD).is_file() or not shutil.which("ssh"):
        pytest.skip("needs root, sshd and ssh (Debian: openssh-server)")
    root, port = tmp_path_factory.mktemp("sshd"), free_port()
    for name in ("host", "user"):
        keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(root / name)]
        subprocess.run(keygen, check=True, timeout=30)
    public = (root / "host.pub").read_text().split()[:2]
    (root / "known_hosts").write_text(
        "".join(f"[{name}]:{port} {' '.join(public)}\n" for name in ("127.0.0.1",))
    )
    (root / "authorized_keys").write_text((root / "user.pub").read_text())
    (root / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {root}/host\nAuthorizedKeysFile {root}/authorized_keys\n"
        "StrictModes no\nUsePAM no\nUseDNS no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
        "PidFile none\n"
    )
    (root / "ssh_config").write_text(
        f"Host alpha\n  HostName 127.0.0.1\n  HostKeyAlias [127.0.0.1]:{port}\n  User {getpass.getuser()}\n"
        f"  IdentityFile {root}/user\n  UserKnownHostsFile {root}/known_hosts\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)
    process = subprocess.Popen([SSHD, "-D", "-f", str(root / "sshd_config")], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60.0
        while time.monotonic() < deadline:
            with socket.socket() as knock:
                if knock.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"ssh -F {root}/ssh_config", port
    finally:
        process.terminate()
        process.wait()


def test_over_a_real_sshd(
    sshd: tuple[str, int],
    workspace: Workspace,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ssh, port = sshd
    write_model(workspace.path / "model")
    (workspace.path / "hosts").write_text("alpha slots=1\ngamma slots=1\n")
    # Reaches the hosts through .deepspeed_env, as a launcher would bring it there.
    (workspace.path / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=lo\n")
    monkeypatch.setenv("HOME", str(workspace.path))
    command = [
        "doctor",
        "--recipe",
        "recipe.yaml",
        "--hostfile",
        "hosts",
        "--ssh",
        ssh,
        "--ssh-port",
        str(port),
    ]
    gathering = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    assert exit_code([*command, *gathering]) == 2
    shown = capsys.readouterr().out
    assert "1 ranks add up correctly over gloo" in shown
    assert "GLOO_SOCKET_IFNAME=lo" in shown
    verdict = shown.splitlines()[-1]
    assert verdict.startswith("verdict: not ready")
    assert "ssh" in verdict
    assert "gamma" in verdict
