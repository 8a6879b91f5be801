"""launchers/timing.py: the table and the file with the wall time of every part."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "launchers" / "timing.py"


def write_record(run_dir: Path, stage: str, seconds: float, modified: float) -> None:
    record = run_dir / "stages" / f"{stage}.json"
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({"stage": stage, "seconds": seconds}))
    os.utime(record, (modified, modified))


def test_stages_of_this_launch_are_timed_and_older_ones_are_up_to_date(tmp_path: Path) -> None:
    write_record(tmp_path, "prepare", 4.0, modified=500.0)
    write_record(tmp_path, "train", 321.25, modified=2000.0)
    write_record(tmp_path, "translate.base", 100.0, modified=500.0)
    write_record(tmp_path, "translate.fewshot", 20.0, modified=2000.0)
    write_record(tmp_path, "translate.trained", 10.5, modified=2000.0)
    result = subprocess.run(
        [
            sys.executable,
            SCRIPT,
            tmp_path,
            "--ranks",
            "2",
            "--stages-started",
            "1000",
            "install=7",
            "stages=330",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["install", "7"] in lines
    assert ["train", "321.2"] in lines
    assert ["translate", "30.5"] in lines
    assert ["prepare", "up", "to", "date"] in lines
    assert lines[-1] == ["total", "337"]
    timing = json.loads((tmp_path / "timing.json").read_text())
    assert timing["ranks"] == 2
    assert timing["parts"] == {"install": 7, "stages": 330}
    assert timing["stages"] == {"train": 321.25, "translate": 30.5}
    assert timing["total"] == 337
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["timing.json"]
