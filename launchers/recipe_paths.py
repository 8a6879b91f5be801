"""Print where a recipe's base model and run directory are, one per line.

usage: recipe_paths.py [STAGE] --recipe FILE [--set KEY=VALUE]... [anything]

The recipe is only read, not checked: the base model may not be there yet.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lander_ds.common.errors import LanderError
from lander_ds.config.loading import load_recipe


def main() -> int:
    """Print; returns the exit code."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[])
    options, _ = parser.parse_known_args()
    try:
        recipe = load_recipe(options.recipe, options.set)
    except LanderError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    print(recipe.model.path, recipe.run_dir, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
