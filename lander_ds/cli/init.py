"""`lander init`."""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

from lander_ds.common import console
from lander_ds.common.errors import ConfigError
from lander_ds.common.files import write_text
from lander_ds.common.shipped import shipped
from lander_ds.config.deepspeed_json import check_deepspeed_json
from lander_ds.config.recipe import ModelConfig, Recipe
from lander_ds.config.starter import Wish, nearest_size, starter
from lander_ds.config.strict import build as build_recipe
from lander_ds.config.yaml_source import parse_yaml
from lander_ds.models.hub import is_hub_id
from lander_ds.models.loading import build
from lander_ds.preflight.recipe import check_recipe


def run(arguments: argparse.Namespace) -> None:
    """Write a recipe and its DeepSpeed JSON, once the recipe is sound."""
    output: Path = arguments.output
    json = output.with_name(f"{output.stem}.{arguments.topology}.json")
    for path in (output, json):
        if path.exists():
            raise ConfigError(f"{path} exists: move it away, or name another file with --output")
    if not output.parent.is_dir():
        raise ConfigError(f"--output {output}: there is no directory {output.parent}: make it")
    corpora = [(split, getattr(arguments, split)) for split in ("train", "valid", "test")]
    size = arguments.size or _size(arguments.model)
    source = shipped(f"ds_configs/{size}/{arguments.topology}.json")
    if not source.exists():
        raise ConfigError(f"--topology {arguments.topology}: does not fit models of {size}: choose zero3")
    wish = Wish(
        model=arguments.model,
        pairs=arguments.pairs,
        corpora=tuple((split, path) for split, paths in corpora for path in paths),
        run_dir=arguments.run_dir or f"runs/{output.stem}",
        topology=arguments.topology,
    )
    text = starter(size, wish, str(output), str(json))
    document = parse_yaml(text, f"{output} (not written)")
    recipe = check_recipe(build_recipe(Recipe, document), None, document, download=False)
    check_deepspeed_json(replace(recipe, deepspeed=str(source)))
    shutil.copyfile(source, json)
    write_text(output, text)
    console.write_line(f"{output} and {json}: written, after those for models of {size}. Next:")
    console.write_line(f"  lander all --recipe {output}")
    console.write_line("or, on several GPUs:")
    console.write_line(f"  deepspeed --num_gpus 8 --module lander_ds all --recipe {output}")


def _size(model: str) -> str:
    """Of a base model, by its config.json.

    Raises:
        ConfigError: it is a hub id.
        ModelError: it cannot be read.
    """
    if is_hub_id(model):
        raise ConfigError(f"--model {model}: of a hub id say the size, too: --size 7b")
    built, _ = build(ModelConfig(model))
    return nearest_size(sum(parameter.numel() for parameter in built.parameters()))
