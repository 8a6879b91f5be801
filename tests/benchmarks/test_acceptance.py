"""The first look at a card: its bundle, its table, and a real training of it, on the CPU."""

from __future__ import annotations

import json
import tarfile
import time
from pathlib import Path

import acceptance
import pytest

ROW = {
    "size": "7b",
    "method": "lander",
    "tokens_per_second": 1234.5,
    "seconds": 0.5,
    "mfu": 0.42,
    "busy": None,
    "peak_gb": 20.0,
    "planned_gb": 19.0,
    "planned_seconds": 0.4,
}


def test_the_bundle_has_what_a_machine_without_network_needs(tmp_path: Path) -> None:
    size = acceptance.write_bundle(tmp_path / "lander.tar.gz")
    assert size < acceptance.BUNDLE_BYTES
    with tarfile.open(tmp_path / "lander.tar.gz") as archive:
        names = set(archive.getnames())
    assert {
        "lander/benchmarks/acceptance.py",
        "lander/lander_ds/cli/main.py",
        "lander/requirements.txt",
    } <= names
    assert "lander/examples/sample/train.en-de.jsonl" in names


def test_the_table_shows_figures_and_failures() -> None:
    failed = {"size": "7b", "method": "full", "failure": "exit code 1: full.log"}
    life = {"size": "270m", "largest_difference": 0.0, "largest_change": 1e-4, "exports": ["dense"]}
    page = acceptance.table(
        {
            "card": {"name": "A card"},
            "date": "2026-01-01",
            "torch": "2",
            "tests": {"summary": "3 passed"},
            "speed": [ROW, failed],
            "life": [life],
        }
    )
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {10}
    assert "| 7b | lander | 1,234 | 0.500 | 0.400 | 42.0% |" in rows[2]
    assert "| 7b | full | exit code 1: full.log |" in rows[3]
    assert "killed and resumed, weights differ by at most 0.0e+00" in page


def test_unknown_words_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--parts", "sped"], ["--sizes", "3b"], ["--methods", "dora"]):
        with pytest.raises(SystemExit):
            acceptance.main(arguments)
        assert f"unknown {arguments[1]}" in capsys.readouterr().err


@pytest.mark.distributed
def test_a_training_is_measured_and_a_failure_shown(tmp_path: Path) -> None:
    card = acceptance.Card("CPU", 16.0, 0.1)
    own = acceptance.Acceptance(tmp_path, card, time.monotonic() + 400, batch=512, pack=512)
    row = own.speed("tiny", "lora", steps=1)
    assert "failure" not in row, (tmp_path / "tiny-lora.log").read_text()[-2000:]
    assert row["tokens_per_second"] == pytest.approx(400 / row["seconds"], rel=0.3)
    assert row["planned_gb"] > 0
    assert 0 < row["mfu"] < 1
    json.dumps(row)
    late = acceptance.Acceptance(tmp_path, card, time.monotonic(), batch=512, pack=512)
    assert late.speed("tiny", "full", steps=1)["failure"].startswith("out of time: ")
