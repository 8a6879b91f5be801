"""Files of the repository that stand beside the package and that wheels carry inside it: `ds_configs/` and `recipes/`."""

from __future__ import annotations

from pathlib import Path

SIZES = ("270m", "560m", "1b", "7b", "13b", "70b", "176b")
"""Of models, as both name them."""

_PACKAGE = Path(__file__).parents[1]


def shipped(name: str) -> Path:
    """Where `name`, such as `recipes/7b.yaml`, lies here."""
    # setup.py puts them there.
    inside = _PACKAGE / "shipped"
    return (inside if inside.is_dir() else _PACKAGE.parent) / name
