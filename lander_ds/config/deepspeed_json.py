"""The DeepSpeed JSON of a recipe: read, compared with the recipe, and completed.

Whatever the recipe decides (batch sizes, precision, clipping, optimizer, schedule) is "auto" in the JSON, or
must agree with it. `deepspeed_strict` refuses keys that DeepSpeed does not know and would let pass.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lander_ds.config.deepspeed_strict import read_deepspeed_json
from lander_ds.config.deepspeed_topology import NO_LEAVES, ZERO_STAGE, check_zero, complete_zero
from lander_ds.config.document import KeyPath, Problems, lookup
from lander_ds.config.recipe import Recipe


def load_deepspeed_json(path: Path) -> dict[str, Any]:
    """The content of a DeepSpeed JSON, every key and value of which DeepSpeed knows.

    Raises:
        ConfigError: one message with every unknown key, wrong value and key that this trainer cannot honour.
    """
    content: dict[str, Any] = read_deepspeed_json(path).value
    return content


def resolve_deepspeed_config(
    recipe: Recipe, world_size: int, micro_batches: int, content: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What to give to DeepSpeed: the recipe's JSON with everything that the recipe decides filled in.

    Args:
        recipe: names the JSON.
        world_size: data-parallel ranks.
        micro_batches: micro-batches per rank and optimizer step.
        content: of the JSON, as `check_deepspeed_json` returned it; default: it is read.

    Raises:
        ConfigError: as `check_deepspeed_json`.
    """
    config: dict[str, Any] = _without_auto(dict(check_deepspeed_json(recipe) if content is None else content))
    for decided_by_the_recipe in ("optimizer", "pipeline", "activation_checkpointing"):
        config.pop(decided_by_the_recipe, None)
    config["train_micro_batch_size_per_gpu"] = recipe.train.micro_batch
    config["gradient_accumulation_steps"] = micro_batches
    config["train_batch_size"] = recipe.train.micro_batch * micro_batches * world_size
    # Always explicit: DeepSpeed clips at 1.0 when nothing is said.
    config["gradient_clipping"] = recipe.train.clip
    config["bf16"] = {**(config.get("bf16") or {}), "enabled": recipe.model.dtype == "bfloat16"}
    config["fp16"] = {**(config.get("fp16") or {}), "enabled": recipe.model.dtype == "float16"}
    # Without a word DeepSpeed would add up the micro-batches' gradients in the type of the weights.
    config["data_types"] = {"grad_accum_dtype": "fp32", **(config.get("data_types") or {})}
    config.setdefault("zero_allow_untested_optimizer", True)
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    zero = config["zero_optimization"]
    for name in ("offload_optimizer", "offload_param"):
        # A block that offloads nothing is left out, so that its presence means offloading.
        if lookup(zero, (name, "device")) in (None, "none"):
            zero.pop(name, None)
    complete_zero(zero, recipe.topology)
    return config


def resolve_inference_config(recipe: Recipe, world_size: int) -> dict[str, Any]:
    """What `translate.weights: sharded` gives to DeepSpeed in every topology: ZeRO-3 over all ranks, no optimizer.

    Args:
        recipe: names the JSON. What a stage-3 JSON says of weights (`offload_param`, thresholds) holds here too.
        world_size: all ranks, each of which is a data-parallel rank.

    Raises:
        ConfigError: as `check_deepspeed_json`.
    """
    config = resolve_deepspeed_config(recipe, world_size, micro_batches=1)
    if ZERO_STAGE[recipe.topology] != 3:
        config["zero_optimization"] = {"stage": 3, "overlap_comm": False, **NO_LEAVES}
    config["zero_optimization"].pop("offload_optimizer", None)
    return config


def _without_auto(value: Any, path: KeyPath = ()) -> Any:
    """`value` without keys that are "auto": the recipe fills them, or DeepSpeed has defaults."""
    if not isinstance(value, dict):
        return copy.deepcopy(value)
    return {
        key: _without_auto(item, (*path, key))
        for key, item in value.items()
        if item != "auto" or (*path, key) == ("data_types", "keep_in_fp32_modules")
    }


def check_deepspeed_json(recipe: Recipe) -> dict[str, Any]:
    """The content of the recipe's DeepSpeed JSON, once nothing in it contradicts the recipe.

    Raises:
        ConfigError: as `load_deepspeed_json`, or the two contradict each other.
    """
    document = read_deepspeed_json(Path(recipe.deepspeed))
    config: dict[str, Any] = document.value
    problems = Problems(document)
    check_zero(config.get("zero_optimization") or {}, recipe, problems)
    counts = "follows from the recipe keys train.batch_tokens, train.pack_tokens and the number of ranks"
    for key in ("train_batch_size", "gradient_accumulation_steps"):
        if config.get(key, "auto") not in ("auto", None):
            problems.add((key,), f'{counts}, found {config[key]}; write "auto"')
    dtype, clip, micro = recipe.model.dtype, recipe.train.clip, recipe.train.micro_batch
    stages, recompute = recipe.pipeline_stages, recipe.train.activation_checkpointing
    expected: tuple[tuple[KeyPath, Any, str], ...] = (
        (("train_micro_batch_size_per_gpu",), micro, f"train.micro_batch: {micro}"),
        (("gradient_clipping",), clip, f"train.clip: {clip:g}"),
        (("bf16", "enabled"), dtype == "bfloat16", f"model.dtype: {dtype}"),
        (("fp16", "enabled"), dtype == "float16", f"model.dtype: {dtype}"),
        (("pipeline", "stages"), stages, f"pipeline_stages: {stages}"),
        (
            ("pipeline", "activation_checkpoint_interval"),
            int(recompute),
            f"train.activation_checkpointing: {json.dumps(recompute)}",
        ),
    )
    for path, wanted, source in expected:
        value = lookup(config, path)
        if value not in (None, "auto", wanted):
            problems.add(path, f'the recipe says {source}, found {json.dumps(value)}; write "auto"')
    optimizer = lookup(config, ("optimizer", "type"))
    if optimizer and recipe.train.optimizer != "adamw":
        problems.add(
            ("optimizer", "type"),
            f"the recipe says train.optimizer: {recipe.train.optimizer}, found {optimizer}; remove the block",
        )
    problems.refuse()
    return config
