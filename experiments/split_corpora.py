#!/usr/bin/env python3
"""Make the corpora of the experiments out of sentence pairs whose origin is known.

    split_corpora.py CORPORA OUT     reads CORPORA/{train,valid,test}.en-XX.jsonl and examples/sample, writes the same names

Training data is taken as it is, with every origin. Test sentences are only those whose licence lets them be passed on
(with examples/sample's notices), because they are published with the results; what may be passed on of the validation
data joins them, and the rest of it is what learning rates are chosen by. No test sentence stands in training data.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

LANGUAGES = ("de", "fr", "ru", "cs", "es", "zh", "vi", "ro", "ar", "hi")
SHAREABLE = {"udhr", "debian-handbook", "gnome-help", "libreoffice-help", "mozilla"}
SAMPLE = Path(__file__).parents[1] / "examples" / "sample"
MOST = 500
"""Test sentences per language."""

Row = dict[str, str]


def read(path: Path) -> list[Row]:
    """The rows of a JSON lines file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write(path: Path, rows: list[Row]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main() -> int:
    """Run; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpora", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for language in LANGUAGES:
        name = f"en-{language}.jsonl"
        train = read(options.corpora / f"train.{name}")
        valid = read(options.corpora / f"valid.{name}")
        taken = {text for row in train for text in (row["src"], row["tgt"])}
        test = []
        for row in (
            *read(options.corpora / f"test.{name}"),
            *read(SAMPLE / f"test.{name}"),
            *(row for row in valid if row["origin"] in SHAREABLE),
        ):
            if row["origin"] in SHAREABLE and row["src"] not in taken and row["tgt"] not in taken:
                test.append(row)
                taken |= {row["src"], row["tgt"]}
        shutil.copyfile(options.corpora / f"train.{name}", options.out / f"train.{name}")
        write(options.out / f"valid.{name}", [row for row in valid if row["origin"] not in SHAREABLE])
        write(options.out / f"test.{name}", test[:MOST])
        counts = f"{len(train)} training, {min(len(test), MOST)} test sentences"
        sys.stderr.write(f"{language}: {counts}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
