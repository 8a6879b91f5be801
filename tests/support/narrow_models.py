"""Models of the sizes in ds_configs, of the same family, a few layers and little width, and trainings with them.

They are wide enough that their matrices exceed the persistence thresholds of the JSONs: ZeRO-3 shards them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from deepspeed.runtime.config import DeepSpeedConfig
from transformers import AutoModelForCausalLM, BloomConfig, Gemma3TextConfig, LlamaConfig, PretrainedConfig

from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.deepspeed_json import resolve_deepspeed_config
from lander_ds.config.recipe import Recipe
from lander_ds.distributed import collectives, process_group
from lander_ds.models.loading import hf_config
from lander_ds.models.weights import base_fingerprint
from lander_ds.stages import prepare, train
from lander_ds.training.session import micro_batches
from support.selections import random_selection
from support.tiny_run import VOCABULARY, TinyRun

ARITHMETIC = "arithmetic.json"
DATA_RANKS = (1, 2, 3, 8, 64)
SPECIAL = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "vocab_size": VOCABULARY}


def _bloom(layers: int, width: int) -> PretrainedConfig:
    return BloomConfig(n_layer=layers, hidden_size=width, n_head=4, **SPECIAL)


def _llama(layers: int, width: int, neurons: int, groups: int, tied: bool = False) -> PretrainedConfig:
    return LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=neurons,
        num_attention_heads=8,
        num_key_value_heads=groups,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        **SPECIAL,
    )


def _gemma(layers: int) -> PretrainedConfig:
    return Gemma3TextConfig(
        num_hidden_layers=layers,
        hidden_size=192,
        intermediate_size=576,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        sliding_window=16,
        **SPECIAL,
    )


CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "270m": lambda: _gemma(8),
    "560m": lambda: _bloom(7, 48),
    "1b": lambda: _llama(8, 64, 160, groups=2, tied=True),
    "7b": lambda: _llama(7, 64, 288, groups=8),
    "13b": lambda: _llama(7, 96, 384, groups=8),
    "70b": lambda: _llama(9, 96, 384, groups=1),
    "176b": lambda: _bloom(8, 136),
}
"""By size in ds_configs. More layers would repeat the same steps: that seventy of them are trained says nothing new."""


def make_narrow(runs: TinyRun, size: str) -> None:
    """Put a model of `size` and its prepared data beside the tiny run's."""
    path = runs.root / size
    shutil.copytree(runs.model, path, ignore=shutil.ignore_patterns("*.safetensors", "*config.json"))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (runs.model / name).exists():
            shutil.copy(runs.model / name, path / name)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(CONFIGS[size](), dtype=torch.bfloat16).save_pretrained(path)
    recipe = runs.recipe(f"prepared-{size}", f"model.path={path}")
    prepare.run(recipe, RunDirectory(runs.root / f"prepared-{size}"))


def train_narrow(recipe: Recipe, run: RunDirectory) -> None:
    """Stage train under a JSON of ds_configs; what DeepSpeed makes of it in other worlds goes to a file."""
    if process_group.rank() == 0:
        size = Path(recipe.model.path).name
        # Over the tiny run's: meanwhile the other ranks look whether there are any.
        shutil.copytree(run.path.parent / f"prepared-{size}" / "data", run.data, dirs_exist_ok=True)
        config, _ = hf_config(recipe.model)
        layers = config.num_hidden_layers
        neurons = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        chosen = (layers // 4, layers // 2, layers - 3, layers - 2)
        selection = random_selection(neurons, chosen, recipe.data.pairs, frozen=False)
        metadata = {"base_fingerprint": base_fingerprint(recipe.model.path)}
        replace(selection, metadata=metadata).save(run.selection)
        (run.path / ARITHMETIC).write_text(json.dumps([_batch(recipe, ranks) for ranks in DATA_RANKS]))
    collectives.barrier()
    train.run(recipe, run)


class _Grid:
    """As much of a process grid as DeepSpeed's configuration asks: the number of data-parallel ranks."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks

    def get_data_parallel_world_size(self) -> int:
        return self._ranks


def _batch(recipe: Recipe, ranks: int) -> dict[str, int]:
    """What DeepSpeed itself reads from the resolved JSON in a world of `ranks` data-parallel ranks."""
    resolved = resolve_deepspeed_config(recipe, ranks, micro_batches(recipe, ranks))
    read = DeepSpeedConfig(resolved, _Grid(ranks))
    return {
        "ranks": ranks,
        "world_size": read.world_size,
        "global": read.train_batch_size,
        "micro": read.train_micro_batch_size_per_gpu,
        "accumulated": read.gradient_accumulation_steps,
        "stage": int(read.zero_optimization_stage),
    }
