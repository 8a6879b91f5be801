"""Two hosts in network namespaces: pdsh trains what one host trains, and a killed rank leaves nothing behind.

benchmarks/cluster.py does the same with every launcher and more faults.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import TOLERANCE
from lab import HEAD, Lab, missing
from launches import Job, Launch, idle, laboratory, left, tiny_job
from support import worlds

WHY = missing()
ONE_HOST = "one-host"
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.distributed,
    pytest.mark.skipif(bool(WHY), reason=f"no hosts can be made here: {WHY}"),
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with laboratory(tmp_path_factory.mktemp("hosts") / "lab", ranks=2, slurm=False) as built:
        yield built


@pytest.fixture(scope="module")
def job(lab: Lab) -> Job:
    """Has trained on one host."""
    built = tiny_job(lab.directory / "job", ranks=2, steps=12)
    worlds.run_world(built.runs, built.ranks, [worlds.Job(ONE_HOST, tuple(built.overrides))])
    return built


def test_hosts_are_apart(lab: Lab) -> None:
    nodes = [host for host in lab.hosts if host != HEAD]
    for host in nodes:
        assert lab.run(HEAD, ["ssh", host, "hostname"]).strip() == host
        assert sys.executable not in lab.run(host, ["ps", "-e", "-o", "args="])
    lab.run(HEAD, ["touch", "/tmp/of-the-head"])
    assert "of-the-head" not in lab.run(nodes[0], ["ls", "/tmp"])
    assert not Path("/tmp/of-the-head").exists()


def test_pdsh_trains_as_one_host(lab: Lab, job: Job) -> None:
    job.copy("pdsh")
    before = idle(lab)
    launch = Launch(lab, job, "pdsh", "pdsh")
    assert launch.wait() == 0, launch.tail()
    assert left(lab, before) == []
    assert_as_one_host(job, "pdsh")


@pytest.mark.long
def test_a_launcher_on_one_host_trains_as_a_world(lab: Lab, job: Job) -> None:
    job.copy("single")
    launch = Launch(lab, job, "single", "single")
    assert launch.wait() == 0, launch.tail()
    assert_as_one_host(job, "single")


@pytest.mark.long
def test_pdsh_after_a_killed_rank_ends_as_one_host(lab: Lab, job: Job) -> None:
    """The launcher starts again by itself; the losses of both attempts together are those of one host."""
    job.copy("killed")
    before = idle(lab)
    launch = Launch(lab, job, "pdsh", "killed", ["--max-restarts", "1"])
    launch.wait_for_step(6)
    launch.rank_on(lab.hosts[-1]).kill()
    assert launch.wait() == 0, launch.tail()
    said = launch.log.read_text(encoding="utf-8")
    assert "exit code 137: restart 1 of 1" in said
    assert "going on from" in said
    assert left(lab, before) == []
    assert_as_one_host(job, "killed")


def assert_as_one_host(job: Job, name: str) -> None:
    difference = job.difference(name, f"{ONE_HOST}-{job.ranks}")
    assert difference is not None
    assert difference <= TOLERANCE


def test_a_host_that_is_off_is_named(lab: Lab, job: Job) -> None:
    job.copy("cut")
    lab.cut(lab.hosts[-1])
    try:
        launch = Launch(lab, job, "pdsh", "cut")
        assert launch.wait() == 255
        assert f"{lab.hosts[-1]} is lost" in launch.tail()
        assert not (job.run_dir("cut") / "metrics.jsonl").exists()
    finally:
        lab.mend(lab.hosts[-1])
