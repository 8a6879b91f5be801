"""Print how long each part of a demonstration took, and write it to RUN_DIR/timing.json.

The launcher measures its own parts; the stages' times come from the records they leave in RUN_DIR/stages.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from lander_ds.common.files import write_json
from lander_ds.stages.catalogue import STAGES


def part(text: str) -> tuple[str, int]:
    """Parse `NAME=SECONDS`."""
    name, _, seconds = text.partition("=")
    return name, int(seconds)


def stage_seconds(run_dir: Path, started: float) -> dict[str, float]:
    """Wall time of every stage that has a record not older than `started` (seconds since the epoch).

    A stage that was up to date left its records alone, and is missing here. Stage translate has a record per
    system, `translate.SYSTEM.json`; what ran is added up.
    """
    seconds: dict[str, float] = {}
    for stage in STAGES:
        directory = run_dir / "stages"
        for record in [directory / f"{stage}.json", *directory.glob(f"{stage}.*.json")]:
            if record.is_file() and record.stat().st_mtime >= started:
                written = json.loads(record.read_text(encoding="utf-8"))
                seconds[stage] = seconds.get(stage, 0.0) + float(written["seconds"])
    return seconds


def table(parts: dict[str, int], stages: dict[str, float]) -> list[str]:
    """Lines: every part with its seconds, the stages below the part `stages`, and the total."""
    lines = ["wall time of each part, in seconds"]
    for name, seconds in parts.items():
        lines.append(f"  {name:<12}{seconds:>8d}")
        if name == "stages":
            lines += [
                f"    {stage:<10}{f'{stages[stage]:.1f}' if stage in stages else 'up to date':>12}"
                for stage in STAGES
            ]
    lines.append(f"  {'total':<12}{sum(parts.values()):>8d}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("parts", type=part, nargs="+", metavar="NAME=SECONDS", help="wall time of a part")
    parser.add_argument("--ranks", type=int, required=True, help="processes that ran the stages")
    parser.add_argument("--stages-started", type=float, required=True, help="seconds since the epoch")
    options = parser.parse_args(arguments)

    parts = dict(options.parts)
    stages = stage_seconds(options.run_dir, options.stages_started)
    timing = {
        "machine": {"cores": os.cpu_count(), "architecture": platform.machine()},
        "ranks": options.ranks,
        "parts": parts,
        "stages": stages,
        "total": sum(parts.values()),
    }
    write_json(options.run_dir / "timing.json", timing)
    print("\n".join(table(parts, stages)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
