"""A first recipe for somebody's own model and corpora: the repository's for a model of that size, with theirs in it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from lander_ds.common.shipped import SIZES, shipped
from lander_ds.config.recipe import Topology

_UNITS = {"m": 1e6, "b": 1e9}
_HEADER = """\
# Written by `lander init`, after the recipe for models of {size}. `lander config --explain KEY` says what a key means,
# `lander config --recipe {name} --dump` prints every key with its value.
"""


@dataclass(frozen=True)
class Wish:
    """What somebody wants to train on what."""

    model: str
    """Directory, or hub id."""
    pairs: tuple[str, ...]
    """Directions."""
    corpora: tuple[tuple[str, str], ...]
    """(split, path), the path with placeholders."""
    run_dir: str
    """Where the run will lie."""
    topology: Topology
    """How the model is spread over the ranks."""


def nearest_size(parameters: int) -> str:
    """The size whose files fit a model with so many parameters best."""
    return min(SIZES, key=lambda size: abs(math.log(parameters / (float(size[:-1]) * _UNITS[size[-1]]))))


def starter(size: str, wish: Wish, name: str, deepspeed: str) -> str:
    """The text of a recipe.

    Args:
        size: one of `SIZES`.
        wish: what is filled in.
        name: of the file that it will be.
        deepspeed: path of the DeepSpeed JSON.
    """
    _, _, text = shipped(f"recipes/{size}.yaml").read_text(encoding="utf-8").partition("\nrun_dir:")
    text = f"{_HEADER.format(size=size, name=name)}run_dir:{text}"
    for pattern, value in (
        (r"(?<=^run_dir: ).*", _text(wish.run_dir)),
        (r"(?<=^topology: )\w+", wish.topology),
        (r"(?<=^deepspeed: ).*", _text(deepspeed)),
        (r"(?<=^  path: ).*", _text(wish.model)),
        (r"(?<=^  pairs: )\[.*?\]", f"[{', '.join(map(_text, wish.pairs))}]"),
        (r"^  corpora:.*\n(    - .*\n)+", _corpora(wish.corpora)),
    ):
        literal = value.replace("\\", r"\\")
        text, count = re.subn(pattern, literal, text, flags=re.MULTILINE)
        assert count == 1, f"recipes/{size}.yaml: {pattern}"
    return text


def _corpora(corpora: Sequence[tuple[str, str]]) -> str:
    lines = [f"    - {{path: {_text(path)}, split: {split}}}\n" for split, path in corpora]
    return "".join(["  corpora:  # further ones, and what a corpus may say: docs/data.md\n", *lines])


def _text(value: str) -> str:
    """As YAML: JSON is part of it."""
    return json.dumps(value, ensure_ascii=False)
