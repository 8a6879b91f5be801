"""What a host says about the recipe: whether it is sound there, the facts that ranks compare, what it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lander_ds.cluster.doctor.estimate import need_of
from lander_ds.cluster.doctor.shared import free_bytes
from lander_ds.common.errors import LanderError
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.loading import load_recipe, read_recipe
from lander_ds.distributed.engines.deepspeed_internals import check_deepspeed
from lander_ds.distributed.start import Start
from lander_ds.models.hub import with_local_model
from lander_ds.preflight.facts import collect
from lander_ds.preflight.recipe import check_recipe

Part = dict[str, Any]


def facts(path: Path, overrides: list[str]) -> Part:
    """Facts that ranks compare when they start; and whether the recipe passes its checks here.

    Returns: `facts` as of `preflight.facts.collect`; `warning`: what keeps other stages than train from running, or None.

    Raises:
        LanderError: training could not run here.
    """
    recipe, document = read_recipe(path, overrides)
    recipe = check_recipe(recipe, "train", document, download=False)
    seen = collect(Start(recipe, RunDirectory(recipe.run_dir)))
    warning = None
    try:
        check_recipe(recipe, "all", document, download=False)
    except LanderError as error:
        warning = str(error)
    return {"facts": seen, "warning": warning}


def disk(path: Path, overrides: list[str]) -> Part:
    """Free bytes where the run directory lies."""
    run_dir = Path(load_recipe(path, overrides).run_dir)
    return {"run_dir": str(run_dir.resolve()), "free": free_bytes(run_dir)}


def topology() -> Part:
    """Whether the installed DeepSpeed fits.

    Raises:
        ConfigError: it does not.
    """
    check_deepspeed()
    return {}


def need(path: Path, overrides: list[str], ranks: list[int]) -> Part:
    """See `estimate.need_of`."""
    return need_of(with_local_model(load_recipe(path, overrides), download=False), ranks).as_json()
