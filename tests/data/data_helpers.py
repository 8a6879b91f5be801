"""What several tests of the data room use."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from lander_ds.config.recipe import Recipe

SAMPLE = Path(__file__).parents[2] / "examples" / "sample"

MakeRecipe = Callable[..., Recipe]


def write_jsonl(path: Path, pairs: Iterable[tuple[str, str]]) -> Path:
    """A corpus of (source, target) pairs."""
    lines = [json.dumps({"src": src, "tgt": tgt}, ensure_ascii=False) for src, tgt in pairs]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
