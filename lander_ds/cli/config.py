"""`lander config`."""

from __future__ import annotations

import argparse

from lander_ds.common import console
from lander_ds.config.deepspeed_json import check_deepspeed_json
from lander_ds.config.loading import dump_recipe
from lander_ds.preflight.recipe import load_checked


def run(arguments: argparse.Namespace) -> None:
    """Check a recipe and its DeepSpeed JSON, and print it if asked to."""
    if arguments.recipe is None:
        arguments.parser.error("--recipe FILE or --explain is needed")
    recipe = load_checked(arguments.recipe, arguments.overrides, None)
    check_deepspeed_json(recipe)
    if arguments.dump:
        console.write_line(dump_recipe(recipe).rstrip("\n"))
    else:
        console.write_line(f"{arguments.recipe}: sound; --dump prints it with every default")
