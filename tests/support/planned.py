"""Recipes whose model is a config.json alone."""

from __future__ import annotations

from pathlib import Path

from lander_ds.config.loading import load_recipe
from lander_ds.config.recipe import Recipe
from support.tiny_models import CONFIGS

ROOT = Path(__file__).parents[2]


def recipe_of(folder: Path, case: str, *overrides: str, size: str = "7b") -> Recipe:
    """The recipe of a size, with the tiny model `case` in its place."""
    path = folder / case
    CONFIGS[case]().save_pretrained(path)
    own = [
        f"model.path={path}",
        f"run_dir={folder / 'run'}",
        f"deepspeed={ROOT}/ds_configs/{size}/zero3.json",
        "model.dtype=float32",
        "select.layers.k=1",
        "routing.hidden=8",
        "data.max_length=24",
        "train.pack_tokens=24",
        "train.batch_tokens=96",
        "train.micro_batch=1",
    ]
    return load_recipe(ROOT / "recipes" / f"{size}.yaml", [*own, *overrides])
