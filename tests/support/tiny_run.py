"""A whole run in miniature: a small random Gemma 3, a tokenizer, real sentences, a recipe, prepared data, a selection."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.loading import load_recipe
from lander_ds.config.recipe import ModelConfig, Recipe
from lander_ds.config.schema.data import CorpusConfig, DataConfig
from lander_ds.data.tokens.sentencepiece_training import train_tokenizer
from lander_ds.method.selection import Selection
from lander_ds.models.weights import base_fingerprint
from lander_ds.stages import prepare
from support.selections import random_selection

SAMPLE = Path(__file__).parents[2] / "examples" / "sample"
PAIRS = ("en-de", "en-fr", "en-es")
SENTENCES = {"train": 100, "valid": 4, "test": 6}
STEPS = 6
VOCABULARY = 480
WIDTH, NEURONS = 32, 64
SELECTED = (1, 3)
"""Decoder layers with banks: one below the first, one between them, are frozen."""

RECIPE = """\
run_dir: run
deepspeed: {root}/zero3.json
seed: 5
model: {{path: {root}/model, dtype: float32}}
data:
  pairs: [en-de, en-fr, en-es]
  cache_dir: {root}/cache
  corpora:
    - {{path: "{root}/train.{{pair}}.jsonl"}}
    - {{path: "{root}/valid.{{pair}}.jsonl", split: valid}}
    - {{path: "{root}/test.{{pair}}.jsonl", split: test}}
  max_length: 96
  detect_examples: 24
  prompt: {{template: "{{tgt_lang}} {{src}} ="}}
detect: {{batch_tokens: 256}}
routing: {{hidden: 8}}
train:
  steps: {steps}
  batch_tokens: 384
  pack_tokens: 96
  optimizer: adamw
  lr: {{general: 1.0e-2, specific: 2.0e-2, gates: 4.0e-2, dense: 1.0e-3, lora: 3.0e-3}}
  clip: 0.0
"""

DEEPSPEED: dict[str, Any] = {
    "zero_optimization": {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 1500},
    "steps_per_print": 1000000,
}
"""The threshold keeps small parameters whole on every rank and shards large ones: both kinds are there."""

JSONS: dict[str, dict[str, Any]] = {
    "zero3": DEEPSPEED,
    "replicated": {"zero_optimization": {"stage": 1}, "steps_per_print": 1000000},
    "replicated-overlap": {
        "zero_optimization": {"stage": 1, "overlap_comm": True},
        "steps_per_print": 1000000,
    },
    "pipeline": {"zero_optimization": {"stage": 1}, "steps_per_print": 1000000},
    "pipeline_zero3": DEEPSPEED,
}
"""By topology; one has two."""


@dataclass(frozen=True)
class TinyRun:
    """Where everything lies."""

    root: Path

    @property
    def recipe_path(self) -> Path:
        """The recipe."""
        return self.root / "recipe.yaml"

    @property
    def untied(self) -> Path:
        """A base model whose head is not its embedding."""
        return self.root / "untied"

    @property
    def experts(self) -> Path:
        """A base model with a mixture of experts."""
        return self.root / "experts"

    @property
    def model(self) -> Path:
        """The base model."""
        return self.root / "model"

    def recipe(self, name: str, *overrides: str) -> Recipe:
        """The recipe of the run `name`; `$root` in an override is the root of all runs."""
        own = [override.replace("$root", str(self.root)) for override in overrides]
        return load_recipe(self.recipe_path, [f"run_dir={self.root / name}", *own])

    def run(self, name: str) -> RunDirectory:
        """The directory of the run `name`, with prepared data and a selection in it."""
        run = RunDirectory(self.root / name)
        if not run.data.exists():
            shutil.copytree(self.root / "prepared" / "data", run.data)
            self.selection().save(run.selection)
        return run

    def selection(self, layers: tuple[int, ...] = SELECTED) -> Selection:
        """General, specific, shared and frozen banks in `layers`."""
        built = random_selection(NEURONS, layers, PAIRS, seed=2)
        return replace(built, metadata={"base_fingerprint": base_fingerprint(self.model)})


def make_tiny_run(root: Path) -> TinyRun:
    """Build one in `root`."""
    for split, count in SENTENCES.items():
        for pair in PAIRS:
            lines = list(_short_lines(SAMPLE / f"{split}.{pair}.jsonl", count))
            (root / f"{split}.{pair}.jsonl").write_text("".join(lines), encoding="utf-8")
            preferred = "".join(map(_with_worse, lines))
            (root / f"preferred.{split}.{pair}.jsonl").write_text(preferred, encoding="utf-8")
    general = [json.loads(line)["tgt"] for line in _short_lines(SAMPLE / "train.en-cs.jsonl", 40)]
    (root / "general.txt").write_text("\n".join(general), encoding="utf-8")
    (root / "recipe.yaml").write_text(RECIPE.format(root=root, steps=STEPS), encoding="utf-8")
    for topology, config in JSONS.items():
        (root / f"{topology}.json").write_text(json.dumps(config), encoding="utf-8")
    corpora = (CorpusConfig(str(root / "train.{pair}.jsonl")),)
    train_tokenizer(
        Recipe("unused", ModelConfig("unused"), DataConfig(PAIRS, corpora), "unused"),
        root / "model",
        VOCABULARY,
    )
    built = TinyRun(root)
    shutil.copytree(built.model, built.untied)
    shutil.copytree(built.model, built.experts)
    _random_gemma(tied=True).save_pretrained(built.model)
    _random_gemma(tied=False).save_pretrained(built.untied)
    _random_mixture().save_pretrained(built.experts)
    prepare.run(built.recipe("prepared"), RunDirectory(root / "prepared"))
    return built


def _short_lines(path: Path, count: int) -> Iterator[str]:
    """The shortest lines of a corpus."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    yield from sorted(lines, key=len)[:count]


def _with_worse(line: str) -> str:
    """The same with a worse translation: the words from behind, without the first."""
    row = json.loads(line)
    return json.dumps({**row, "worse": " ".join(row["tgt"].split()[:0:-1]) or "?"}) + "\n"


def _random_gemma(tied: bool) -> PreTrainedModel:
    """Weights large enough that every neuron matters."""
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=NEURONS,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
        query_pre_attn_scalar=8,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        tie_word_embeddings=tied,
    )
    return _with_random_weights(Gemma3ForCausalLM(config))


def _random_mixture() -> PreTrainedModel:
    """Six experts of a quarter of the neurons each, two for every token."""
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        moe_intermediate_size=NEURONS // 4,
        num_experts=6,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    return _with_random_weights(Qwen3MoeForCausalLM(config))


def _with_random_weights(model: PreTrainedModel) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * noise if parameter.dim() > 1 else 0.1 * noise)
    return model
