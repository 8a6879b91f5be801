"""What one host can say about itself: machine, limits, accelerator, network, tools, recipe, directories.

Every part is looked at by itself: where one fails, its value is `{"error": why}` and the rest still comes. A part
fails, too, where its module cannot be imported: the installation may be what is broken.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lander_ds.common.errors import LanderError
from lander_ds.common.lazy import load

_HERE = __package__


def inspect(
    recipe: Path | None, overrides: list[str], ranks: list[int] | None, address: str | None
) -> dict[str, dict[str, Any]]:
    """All parts.

    Args:
        recipe: the recipe's path here; None leaves out what depends on it.
        overrides: `--set` arguments.
        ranks: of every host, to count what each will hold, which takes seconds; None: leave that out.
        address: where the ranks meet, to see which interface leads there; None: by what `hostname -I` says.
    """
    parts: dict[str, tuple[str, tuple[object, ...]]] = {
        "machine": ("machine:machine", ()),
        "limits": ("machine:limits", ()),
        "accelerator": ("accelerator:accelerator", ()),
        "network": ("addresses:network", (address,)),
        "tools": ("machine:tools", ()),
        "temporary": ("machine:temporary", ()),
        "packages": ("machine:packages", ()),
    }
    if recipe is not None:
        parts["recipe"] = ("recipe_parts:facts", (recipe, overrides))
        parts["disk"] = ("recipe_parts:disk", (recipe, overrides))
        parts["topology"] = ("recipe_parts:topology", ())
        if ranks is not None:
            parts["need"] = ("recipe_parts:need", (recipe, overrides, ranks))
    return {name: _look(target, arguments) for name, (target, arguments) in parts.items()}


def _look(target: str, arguments: tuple[object, ...]) -> dict[str, Any]:
    try:
        part: dict[str, Any] = load(f"{_HERE}.{target}")(*arguments)
        return part
    except LanderError as error:
        return {"error": str(error)}
    except Exception as error:
        # Of any kind: broken installations are what this looks for.
        return {"error": f"{type(error).__name__}: {error}"}
