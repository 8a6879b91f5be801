"""Checks of how a recipe spreads the model over the ranks."""

from __future__ import annotations

from itertools import pairwise

from lander_ds.config.check import Check
from lander_ds.config.deepspeed_topology import ZERO_STAGE


def check_topology(check: Check) -> None:
    """Record what is wrong with `topology`, `frozen_shards`, `pipeline_stages` and `pipeline_cut`; opens no file."""
    recipe = check.recipe
    stages, cut = recipe.pipeline_stages, recipe.pipeline_cut
    if recipe.model.quantize is not None and recipe.sharded:
        check.refuse(
            "model.quantize",
            f"{recipe.model.quantize} does not work with topology: {recipe.topology}, which shards every weight; set "
            "topology: replicated or pipeline, or remove it",
        )
    if recipe.frozen_shards == "node" and ZERO_STAGE[recipe.topology] != 3:
        check.refuse(
            "frozen_shards",
            f"topology: {recipe.topology} does not shard frozen weights, found node; remove it, or set topology: zero3 or "
            "pipeline_zero3",
        )
    if not recipe.pipelined:
        cure = "set topology: pipeline or pipeline_zero3, or remove it"
        if stages > 1:
            check.refuse(
                "pipeline_stages", f"topology: {recipe.topology} has one stage, found {stages}; {cure}"
            )
        if cut:
            check.refuse("pipeline_cut", f"topology: {recipe.topology} has no stages to cut; {cure}")
        return
    if stages == 1:
        check.refuse(
            "pipeline_stages",
            f"topology: {recipe.topology} needs at least 2, found 1; set it, or topology: zero3",
        )
    _check_cut(check, stages, cut)
    if recipe.model.dtype == "float16":
        check.refuse(
            "model.dtype",
            f"float16 does not work with topology: {recipe.topology}, loss scaling would be per stage; "
            f"write bfloat16 or float32",
        )


def _check_cut(check: Check, stages: int, cut: tuple[int, ...]) -> None:
    if not cut or stages < 2:
        return
    if len(cut) != stages - 1:
        check.refuse(
            "pipeline_cut",
            f"{stages} stages need {stages - 1} entries, the first layer of every stage but the first, found "
            f"{len(cut)}; correct it or set pipeline_stages: {len(cut) + 1}",
        )
    elif cut[0] < 1:
        check.refuse(
            "pipeline_cut.0",
            f"the first stage begins with layer 0 and needs at least one, so the second begins with layer 1 or "
            f"later, found {cut[0]}; correct it",
        )
    elif any(later <= earlier for earlier, later in pairwise(cut)):
        check.refuse(
            "pipeline_cut",
            f"every stage begins after the one before it, found {list(cut)}; write increasing layers, each once",
        )


def check_layers_per_stage(check: Check, layers: int) -> None:
    """Record stages that a model with `layers` decoder layers cannot fill."""
    stages, cut = check.recipe.pipeline_stages, check.recipe.pipeline_cut
    if stages > layers:
        check.refuse(
            "pipeline_stages",
            f"every stage needs a decoder layer and the model has {layers}, found {stages}; lower it",
        )
    elif cut and cut[-1] >= layers:
        check.refuse(
            f"pipeline_cut.{len(cut) - 1}",
            f"the model has no layer {cut[-1]}; its layers are 0 to {layers - 1}",
        )
