"""The hostfile: what DeepSpeed would take, and every fault with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from lander_ds.cluster.doctor.finding import fails
from lander_ds.cluster.doctor.hostfile import Host, read_hostfile


def test_comments_and_blank_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# nodes\n\nnode1 slots=8\n  node2\tslots=4  # half of it\n")
    hosts, findings = read_hostfile(path)
    assert hosts == [Host("node1", 8), Host("node2", 4)]
    assert [finding.status for finding in findings] == ["ok"]
    assert "2 hosts, 12 ranks" in findings[0].detail


def test_deepspeed_reads_the_same(tmp_path: Path) -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    path = tmp_path / "hosts"
    path.write_text(
        "# nodes\n\nnode1 slots=8\n  node2\tslots=4  # half of it\n10.0.0.7 slots=1 max_slots=2\n"
    )
    hosts, findings = read_hostfile(path)
    assert {host.name: host.slots for host in hosts} == fetch_hostfile(str(path))
    assert not fails(findings)
    assert findings[0].status == "warn"
    assert "max_slots=2" in findings[0].detail


@pytest.mark.parametrize(
    ("text", "wording"),
    [
        ("node1 slots=8\nnode1 slots=8\n", "line 2: node1 stands in line 1 already"),
        ("node1 slots=8\nnode2\n", "line 2: 'node2' has no slots=N"),
        ("node1 slots=\n", "line 1: 'node1 slots=' is not NAME slots=N"),
        ("node1 slots=four\n", "line 1: 'node1 slots=four' is not NAME slots=N"),
        ("node1 slots = 8\n", "line 1: 'node1 slots = 8' is not NAME slots=N"),
        ("node1 slots=0\n", "line 1: node1 has 0 slots"),
        ("node1 slots=-1\n", "line 1: 'node1 slots=-1' is not NAME slots=N"),
        ("node1:8\n", "line 1: 'node1:8' has no slots=N"),
        ("# nothing yet\n", "names no host"),
        ("", "names no host"),
    ],
)
def test_faults_are_named_with_their_line(text: str, wording: str, tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    _, findings = read_hostfile(path)
    assert fails(findings)
    finding = next(finding for finding in findings if finding.status == "fail")
    assert finding.detail.startswith(str(path))
    assert wording in finding.detail
    assert finding.cure


def test_sound_lines_beside_a_fault_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("node1 slots=8\nnode2\nnode3 slots=2\n")
    hosts, findings = read_hostfile(path)
    assert [host.name for host in hosts] == ["node1", "node3"]
    assert [(finding.host, finding.status) for finding in findings] == [("node2", "fail")]


def test_a_missing_or_unreadable_file_fails(tmp_path: Path) -> None:
    for path, wording in ((tmp_path / "none", "does not exist"), (tmp_path, "cannot be read")):
        hosts, findings = read_hostfile(path)
        assert hosts == []
        assert fails(findings)
        assert wording in findings[0].detail
