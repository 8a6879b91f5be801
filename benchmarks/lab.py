"""Several hosts on one machine: each has its own network, processes, mounts, name and sshd, in Linux namespaces.

A bridge in a namespace of its own joins them; no host has a route out, so nothing leaves. Needs root and the Debian
packages in PACKAGES.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import psutil

PACKAGES = {
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "pdsh": "pdsh",
    "mpirun": "openmpi-bin",
    "sbatch": "slurm-wlm",
    "munged": "munge",
    "ip": "iproute2",
}
"""Program -> Debian package."""

NAME = "lander"
SUBNET = "10.88.0"
START_SECONDS = 15.0
HEAD = "head"
"""The host that launches, and that runs SLURM's controller."""

INIT = """\
set -e
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/sshd /run/munge
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
# A /tmp of its own, where Open MPI and SLURM keep sockets; what all hosts share stays.
mkdir /run/keep
number=0
for shared in {shared}; do
    number=$((number + 1)); mkdir /run/keep/$number; mount --rbind "$shared" /run/keep/$number
done
mount -t tmpfs -o mode=1777 tmpfs /tmp
number=0
for shared in {shared}; do
    number=$((number + 1)); mkdir -p "$shared"; mount --rbind /run/keep/$number "$shared"
done
mount --bind {files}/hosts.{host} /etc/hosts
mount --bind {files}/ssh_config /etc/ssh/ssh_config
hostname {host}
/usr/sbin/sshd -D -e -f {files}/sshd_config 2>>{files}/sshd.{host}.log &
# Ready is who answers: port 22 (0x16) is in state LISTEN (0x0A).
until grep -q ':0016 00000000:0000 0A' /proc/net/tcp; do sleep 0.05; done
touch {files}/ready.{host}
# Process 1 has to reap orphans, which bash does as long as it waits.
while :; do sleep 3600 & wait $! || true; done
"""


def missing() -> str:
    """Why there can be no lab here; "" if there can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "needs root on Linux, for network namespaces"
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    absent = [package for program, package in PACKAGES.items() if shutil.which(program, path=path) is None]
    if absent:
        return f"needs Debian packages: apt-get install {' '.join(absent)}"
    probe = subprocess.run(["unshare", "--net", "--pid", "--fork", "true"], capture_output=True, check=False)
    return "" if probe.returncode == 0 else "network namespaces are not allowed here"


class Lab:
    """The hosts, inside the context. Hosts are up in less than a second."""

    def __init__(self, directory: Path, hosts: Sequence[str], loopback_names: bool = False) -> None:
        """Prepare.

        Args:
            directory: shared by all hosts, as is this repository; absolute, empty or absent.
            hosts: names.
            loopback_names: every host's own name leads to 127.0.1.1, as Debian's installer has it.
        """
        self.directory, self.hosts = directory, list(hosts)
        self.addresses = {host: f"{SUBNET}.{number}" for number, host in enumerate(hosts, start=10)}
        self._files = directory / "hosts"
        self._loopback_names = loopback_names
        self._prefix = f"{NAME}{os.getpid()}"
        self._outer: dict[str, subprocess.Popen[bytes]] = {}
        self._inner: dict[str, int] = {}

    def __enter__(self) -> Lab:
        _remove_stale()
        self._files.mkdir(parents=True)
        self._write_files()
        try:
            self._connect()
            for host in self.hosts:
                self._boot(host)
            self._await_ready()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._remove()

    def start(
        self,
        host: str,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.Popen[bytes]:
        """Run a command on a host; the process that is returned only stands for it, see `signal`."""
        with log.open("ab") as output:
            return subprocess.Popen(
                [*self._enter(host), f"--wd={cwd or self.directory}", *command],
                env={**self._environment(), **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def run(self, host: str, command: Sequence[str], seconds: float = 60.0) -> str:
        """Run a short command on a host; returns its output.

        Raises:
            subprocess.CalledProcessError: it failed.
        """
        return subprocess.run(
            [*self._enter(host), f"--wd={self.directory}", *command],
            env=self._environment(),
            capture_output=True,
            text=True,
            timeout=seconds,
            check=True,
        ).stdout

    def cut(self, host: str) -> None:
        """Pull the host's cable."""
        _ip("-n", self._switch, "link", "set", f"p-{host}", "down")

    def mend(self, host: str) -> None:
        """Plug it in again."""
        _ip("-n", self._switch, "link", "set", f"p-{host}", "up")

    def stop_sshd(self, host: str) -> None:
        """End sshd and all its connections."""
        for process in self.processes(host):
            if process.name().startswith("sshd"):
                process.kill()

    def start_sshd(self, host: str) -> None:
        """Start it again."""
        self.run(host, ["/usr/sbin/sshd", "-f", str(self._files / "sshd_config")])

    def processes(self, host: str) -> Iterator[psutil.Process]:
        """All processes of the host."""
        space = os.readlink(f"/proc/{self._inner[host]}/ns/pid")
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if os.readlink(f"/proc/{process.pid}/ns/pid") == space and process.status() != "zombie":
                    yield process

    def start_slurm(self, cpus: int = 4) -> None:
        """munge everywhere, slurmctld on the head, slurmd on the other hosts.

        Raises:
            RuntimeError: they do not come up.
        """
        nodes = [host for host in self.hosts if host != HEAD]
        folder = self._files / "slurm"
        folder.mkdir()
        (folder / "state").mkdir()
        (folder / "etc").mkdir()
        (folder / "etc" / "slurm.conf").write_text(_slurm_conf(folder, nodes, cpus), encoding="utf-8")
        # Otherwise slurmd looks for control groups, and there are none in these namespaces.
        (folder / "etc" / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        key = folder / "munge.key"
        key.write_bytes(os.urandom(64))
        key.chmod(0o400)
        shutil.chown(key, "munge", "munge")
        for host in self.hosts:
            own = folder / f"munge.{host}"
            own.mkdir()
            shutil.chown(own, "munge", "munge")
            munged = (
                f"setpriv --reuid munge --regid munge --clear-groups /usr/sbin/munged --force --key-file={key} "
                f"--log-file={own}/log --pid-file={own}/pid --seed-file={own}/seed"
            )
            daemon = "slurmctld" if host == HEAD else f"mkdir -p {folder}/spool.{host} && slurmd -N {host}"
            self.run(
                host,
                [
                    "bash",
                    "-ec",
                    f"chown munge:munge /run/munge; {munged}; mkdir -p /etc/slurm; "
                    f"mount --bind {folder}/etc /etc/slurm; {daemon}",
                ],
            )
        deadline = time.monotonic() + 2 * START_SECONDS
        while (state := self.run(HEAD, ["sinfo", "-h", "-o", "%t %D"]).split()) != ["idle", str(len(nodes))]:
            if time.monotonic() > deadline:
                raise RuntimeError(f"SLURM does not come up: {state}; look into {folder}")
            time.sleep(0.2)

    @property
    def _switch(self) -> str:
        return f"{self._prefix}-switch"

    def _environment(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("HOME", "LANG", "USER", "TERM") if name in os.environ}
        return {**kept, "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}

    def _enter(self, host: str) -> list[str]:
        return ["nsenter", "-t", str(self._inner[host]), "-m", "-u", "-i", "-n", "-p"]

    def _write_files(self) -> None:
        """What sshd and ssh need, and every host's /etc/hosts."""
        for name in ("id", "host_key"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self._files / name], check=True
            )
        key = " ".join((self._files / "host_key.pub").read_text().split()[:2])
        known = [f"{name} {key}\n" for host in self.hosts for name in (host, self.addresses[host])]
        (self._files / "known_hosts").write_text("".join(known))
        (self._files / "authorized_keys").write_text((self._files / "id.pub").read_text())
        (self._files / "ssh_config").write_text(
            f"Host *\n  IdentityFile {self._files}/id\n  UserKnownHostsFile {self._files}/known_hosts\n"
            "  StrictHostKeyChecking yes\n  BatchMode yes\n  ConnectTimeout 10\n  LogLevel ERROR\n"
        )
        (self._files / "sshd_config").write_text(
            f"HostKey {self._files}/host_key\nAuthorizedKeysFile {self._files}/authorized_keys\n"
            "StrictModes no\nUsePAM no\nUseDNS no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
            "PidFile none\nMaxStartups 100\nMaxSessions 100\n"
        )
        for host in self.hosts:
            lines = ["127.0.0.1 localhost", *([f"127.0.1.1 {host}"] if self._loopback_names else [])]
            lines += [f"{address} {other}" for other, address in self.addresses.items()]
            (self._files / f"hosts.{host}").write_text("\n".join(lines) + "\n")

    def _connect(self) -> None:
        """Namespaces, and cables from each host to the switch."""
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "br0", "up")
        for host, address in self.addresses.items():
            space = f"{self._prefix}-{host}"
            _ip("netns", "add", space)
            plug = ["peer", "name", f"p-{host}", "netns", self._switch]
            _ip("link", "add", "eth0", "netns", space, "type", "veth", *plug)
            _ip("-n", self._switch, "link", "set", f"p-{host}", "master", "br0", "up")
            _ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
            for name in ("eth0", "lo"):
                _ip("-n", space, "link", "set", name, "up")

    def _boot(self, host: str) -> None:
        # The repository only where a host's own /tmp would hide it.
        shared = [self.directory, *(path for path in _own_places() if path.is_relative_to("/tmp"))]
        script = INIT.format(
            host=host, files=self._files, shared=" ".join(shlex.quote(str(path)) for path in shared)
        )
        # The hosts end with this process, whatever ends it.
        command = ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", f"{self._prefix}-{host}"]
        command += ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--uts", "--ipc", "--mount-proc"]
        with (self._files / f"init.{host}.log").open("wb") as log:
            self._outer[host] = subprocess.Popen(
                [*command, "bash", "-c", script], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def _await_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        for host, process in self._outer.items():
            while not (self._files / f"ready.{host}").exists():
                if time.monotonic() > deadline or process.poll() is not None:
                    log = (self._files / f"init.{host}.log").read_text()
                    raise RuntimeError(f"{host} does not come up: {log}")
                time.sleep(0.02)
            # unshare has one child, which is process 1 of the host.
            self._inner[host] = psutil.Process(process.pid).children()[0].pid

    def _remove(self) -> None:
        for process in self._outer.values():
            # With it goes, by --kill-child, process 1 of the host and so all of its processes.
            process.send_signal(signal.SIGKILL)
            process.wait()
        for space in _spaces():
            if space.startswith(f"{self._prefix}-"):
                _ip("netns", "del", space)


def _slurm_conf(folder: Path, nodes: Sequence[str], cpus: int) -> str:
    options = {
        "ClusterName": NAME,
        "SlurmctldHost": HEAD,
        "SlurmUser": "root",
        "SlurmdUser": "root",
        "AuthType": "auth/munge",
        # A job that queues again waits until its old credential has expired.
        "AuthInfo": "cred_expire=5",
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool.%n",
        "SlurmctldPidFile": "/run/slurmctld.pid",
        "SlurmdPidFile": "/run/slurmd.pid",
        "SlurmctldLogFile": folder / "slurmctld.log",
        "SlurmdLogFile": folder / "slurmd.%n.log",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "AccountingStorageType": "accounting_storage/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU",
        "SwitchType": "switch/none",
        "MpiDefault": "none",
        "ReturnToService": 2,
        "SlurmdTimeout": 15,
        "KillWait": 5,
        # Believe this file rather than the machine.
        "SlurmdParameters": "config_overrides",
        "NodeName": f"{','.join(nodes)} CPUs={cpus} RealMemory=2000 State=UNKNOWN",
        "PartitionName": f"main Nodes={','.join(nodes)} Default=YES MaxTime=INFINITE State=UP",
    }
    return "".join(f"{name}={value}\n" for name, value in options.items())


def _own_places() -> list[Path]:
    """Where this repository, its Python packages and Python itself are."""
    return [Path(__file__).resolve().parents[1], Path(sys.prefix), Path(sys.base_prefix)]


def _spaces() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in listed.splitlines() if line.strip()]


def _remove_stale() -> None:
    """Namespaces of labs whose process was killed."""
    for space in _spaces():
        owner = space.partition("-")[0].removeprefix(NAME)
        if space.startswith(NAME) and owner.isdecimal() and not psutil.pid_exists(int(owner)):
            _ip("netns", "del", space)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
