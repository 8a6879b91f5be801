"""What the parity benchmark runs: tiny random models of several families, one small corpus, and the list of jobs.

The coordinator and the ranks both read this file: a job is sent as JSON and becomes a recipe on either side.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.deepspeed_topology import ZERO_STAGE
from lander_ds.config.recipe import ModelConfig, Recipe, Topology
from lander_ds.config.schema.data import CorpusConfig, DataConfig, PromptConfig
from lander_ds.config.schema.method import DetectConfig, RoutingConfig
from lander_ds.config.schema.training import LearningRates, TrainConfig
from lander_ds.data.tokens.sentencepiece_training import train_tokenizer
from lander_ds.method.selection import Bank, LayerSelection, Selection
from lander_ds.models.catalogue import family_of
from lander_ds.models.weights import base_fingerprint
from lander_ds.stages import prepare

SAMPLE = Path(__file__).parents[1] / "examples" / "sample"
PAIRS = ("en-de", "en-fr", "en-es")
SENTENCES = {"train": 100, "valid": 6}
VOCABULARY, WIDTH, LAYERS = 480, 32, 4
STEPS = 20
CLIP = 0.05
"""Below every gradient norm of every case: clipping always bites."""

TRAINED_LAYERS = (1, 3)
"""With four stages, two train nothing; layer 0 is below the lowest trained layer."""
GATE_WIDTH = 8
SPECIFIC_SHARE, FROZEN_SHARE = 0.15, 0.2

_COMMON = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
_GROUPED = {**_COMMON, "intermediate_size": 64, "num_key_value_heads": 2}

FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "gemma3": lambda: Gemma3TextConfig(
        **_GROUPED,
        head_dim=8,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
        query_pre_attn_scalar=8,
    ),
    "bloom": lambda: BloomConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        n_layer=LAYERS,
        n_head=4,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    ),
    "qwen2": lambda: Qwen2Config(**_GROUPED, tie_word_embeddings=False),
    "opt": lambda: OPTConfig(**_COMMON, ffn_dim=64, word_embed_proj_dim=WIDTH),
    "gpt_neox": lambda: GPTNeoXConfig(**_COMMON, intermediate_size=64, rotary_pct=0.5),
    "llama": lambda: LlamaConfig(**_GROUPED, tie_word_embeddings=False),
    "mistral": lambda: MistralConfig(**_GROUPED, head_dim=8, sliding_window=16),
    "gemma": lambda: GemmaConfig(**_GROUPED, head_dim=8),
    "gemma2": lambda: Gemma2Config(
        **_GROUPED,
        head_dim=8,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=5.0,
    ),
    "qwen3": lambda: Qwen3Config(**_GROUPED, head_dim=8, tie_word_embeddings=True),
}
"""Gemma 3: tied embeddings, embedding scale, sliding windows. BLOOM: biases, ALiBi, tied embeddings, a norm after the
embedding. Qwen 2: a head of its own, grouped heads, biases in attention alone. OPT: learned positions, biases, tied.
GPT-NeoX: attention and FFN side by side, biases. Mistral: sliding windows. Gemma 2: capped scores and logits. Qwen 3:
norms of queries and keys."""

What = Literal["train", "detect", "hold", "load"]
"""`train`: the whole stage. `detect`: the whole stage. `hold`: open a training and count bytes. `load`: the same for a
larger model, and the peak of memory while it is opened."""


@dataclass(frozen=True)
class Grid:
    """A topology on a number of ranks."""

    topology: Topology
    stages: int
    data_ranks: int

    @property
    def ranks(self) -> int:
        """All ranks."""
        return self.stages * self.data_ranks

    @property
    def name(self) -> str:
        """`zero3 on 2 ranks`, or `pipeline 2x1 on 2 ranks`."""
        shape = "" if self.stages == 1 else f" {self.stages}x{self.data_ranks}"
        return f"{self.topology}{shape} on {self.ranks} rank{'s' if self.ranks > 1 else ''}"


REFERENCE = Grid("zero3", 1, 1)
GRIDS = (
    Grid("zero3", 1, 2),
    Grid("zero3", 1, 4),
    Grid("replicated", 1, 2),
    Grid("replicated", 1, 4),
    Grid("pipeline", 2, 1),
    Grid("pipeline", 4, 1),
    Grid("pipeline", 2, 2),
    Grid("pipeline_zero3", 2, 1),
    Grid("pipeline_zero3", 2, 2),
)
QUICK_GRIDS = (Grid("zero3", 1, 2), Grid("pipeline", 2, 1), Grid("pipeline_zero3", 2, 1))
LOAD_GRIDS = (*QUICK_GRIDS, Grid("replicated", 1, 2), Grid("pipeline_zero3", 2, 2))


@dataclass(frozen=True)
class Job:
    """One call on every rank, with a run directory of its own."""

    what: What
    model: str
    """Name of the model directory; of all but `load` the family."""
    grid: Grid
    optimizer: Literal["adamw", "sgd"] = "adamw"
    clip: float = 0.0
    steps: int = STEPS
    """Of a training."""

    @property
    def name(self) -> str:
        """Says everything; also the name of the run directory."""
        parts = [self.model, self.grid.name]
        if self.what == "train":
            parts += [self.optimizer, f"clip {self.clip:g}" if self.clip else "no clipping"]
        else:
            parts.append(self.what)
        return ", ".join(parts)

    @property
    def reference(self) -> Job:
        """The same on one rank."""
        return replace(self, grid=REFERENCE)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @staticmethod
    def from_json(actual: dict[str, Any]) -> Job:
        """From `to_json`."""
        return Job(**{**actual, "grid": Grid(**actual["grid"])})


def jobs_of(
    families: tuple[str, ...], grids: tuple[Grid, ...], clips: tuple[float, ...], steps: int = STEPS
) -> Iterator[Job]:
    """References first, then every grid: detection, trainings with both optimizers and every clipping, bytes."""
    for grid in (REFERENCE, *grids):
        for family in families:
            yield Job("detect", family, grid)
            for clip in clips:
                yield Job("train", family, grid, "sgd", clip, steps)
                yield Job("train", family, grid, "adamw", clip, steps)
            if grid != REFERENCE:
                yield Job("hold", family, grid)


class Workspace:
    """A directory with models, corpora and run directories."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def model(self, name: str) -> Path:
        """A model directory."""
        return self.path / "models" / name

    def run(self, job: Job) -> RunDirectory:
        """The run directory of a job."""
        return RunDirectory(self.path / "runs" / job.name)

    def recipe(self, job: Job) -> Recipe:
        """What a job runs."""
        rates = (0.3, 0.6, 0.6) if job.optimizer == "sgd" else (5e-3, 1e-2, 2e-2)
        # Bytes are counted with every parameter sharded. In the trainings small ones stay whole on every rank, as is
        # usual, so that both ways are there.
        json_name = f"{job.grid.topology}{'' if job.what in ('hold', 'load') else '-train'}.json"
        return Recipe(
            run_dir=str(self.run(job).path),
            model=ModelConfig(str(self.model(job.model)), dtype="float32"),
            data=_data(self.path),
            deepspeed=str(self.path / json_name),
            topology=job.grid.topology,
            pipeline_stages=job.grid.stages,
            seed=5,
            detect=DetectConfig(batch_tokens=256),
            routing=RoutingConfig(hidden=GATE_WIDTH, alpha_max=1.0, budget_weight=0.3, budget=0.3),
            train=TrainConfig(
                steps=job.steps,
                batch_tokens=384,
                pack_tokens=96,
                optimizer=job.optimizer,
                lr=LearningRates(general=rates[0], specific=rates[1], gates=rates[2]),
                clip=job.clip,
                valid_examples=1,
                weight_decay=0.05,
            ),
        )

    def prepare(self, families: tuple[str, ...]) -> None:
        """Write everything that jobs read."""
        for split, count in SENTENCES.items():
            for pair in PAIRS:
                lines = (SAMPLE / f"{split}.{pair}.jsonl").read_text(encoding="utf-8").splitlines(True)
                shortest = "".join(sorted(lines, key=len)[:count])
                (self.path / f"{split}.{pair}.jsonl").write_text(shortest, encoding="utf-8")
        for topology in get_args(Topology):
            for suffix, threshold in (("", 0), ("-train", 1500)):
                zero: dict[str, Any] = {"stage": ZERO_STAGE[topology]}
                if zero["stage"] == 3:
                    zero["stage3_param_persistence_threshold"] = threshold
                config = {
                    "zero_optimization": {**zero, "overlap_comm": False},
                    "steps_per_print": 10**9,
                    "tensorboard": {"enabled": False},
                }
                (self.path / f"{topology}{suffix}.json").write_text(json.dumps(config))
        tokenizer = self.path / "tokenizer"
        train_tokenizer(
            Recipe("unused", ModelConfig("unused"), _data(self.path), "unused"), tokenizer, VOCABULARY
        )
        for family in families:
            shutil.copytree(tokenizer, self.model(family))
            _write_model(FAMILIES[family](), self.model(family))
            job = Job("train", family, REFERENCE)
            prepare.run(self.recipe(job), RunDirectory(self.path / "prepared" / family))
            _selection(self.model(family)).save(self.path / "prepared" / family / "selection.safetensors")

    def prepare_large(self, name: str, layers: int, width: int) -> None:
        """Write a larger model and its selection."""
        config = LlamaConfig(
            **{
                **_GROUPED,
                "vocab_size": 16 * width,
                "hidden_size": width,
                "intermediate_size": 4 * width,
                "num_hidden_layers": layers,
                "num_attention_heads": 8,
                "num_key_value_heads": 8,
            }
        )
        _write_model(config, self.model(name))
        (self.path / "prepared" / name / "data").mkdir(parents=True)
        selection = _selection(self.model(name), (layers // 2 - 1, layers // 2))
        selection.save(self.path / "prepared" / name / "selection.safetensors")

    def open_run(self, job: Job) -> RunDirectory:
        """Make the run directory of a job, with data and selection."""
        run, prepared = self.run(job), self.path / "prepared" / job.model
        shutil.copytree(prepared / "data", run.data)
        shutil.copyfile(prepared / "selection.safetensors", run.selection)
        return run


def _data(root: Path) -> DataConfig:
    corpora = (
        CorpusConfig(str(root / "train.{pair}.jsonl")),
        CorpusConfig(str(root / "valid.{pair}.jsonl"), split="valid"),
    )
    return DataConfig(
        PAIRS,
        corpora,
        prompt=PromptConfig(template="{tgt_lang} {src} ="),
        max_length=96,
        detect_examples=24,
        cache_dir=str(root / "cache"),
    )


def _write_model(config: PretrainedConfig, directory: Path) -> None:
    """Random weights, large enough that every neuron matters."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * 1.1 / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.1 * noise)
    model.save_pretrained(directory)


def _selection(model: Path, layers: tuple[int, ...] = TRAINED_LAYERS) -> Selection:
    """General, specific, shared and frozen banks of neurons drawn at random."""
    from lander_ds.models.loading import build

    built, family = build(ModelConfig(str(model)))
    neurons = family.neurons(built)
    specific, frozen = round(SPECIFIC_SHARE * neurons), round(FROZEN_SHARE * neurons)
    owners = [*((pair,) for pair in PAIRS), (PAIRS[0], PAIRS[-1])]
    banks = (
        Bank("general", PAIRS, neurons - specific * len(owners) - frozen),
        *(Bank("specific", owner, specific) for owner in owners),
        Bank("frozen", (), frozen),
    )
    generator = torch.Generator().manual_seed(2)
    chosen = (LayerSelection(layer, torch.randperm(neurons, generator=generator), banks) for layer in layers)
    return Selection(PAIRS, neurons, tuple(chosen), {"base_fingerprint": base_fingerprint(model)})


def elements_per_part(model: Path) -> tuple[int, list[int], int]:
    """Parameters of a model as they lie on disk: before the layers, of each layer, and of what follows (norm, head).

    A tied head counts in both places, because that is what a stage that has the one and not the other must hold.
    """
    config = AutoConfig.from_pretrained(model)
    family = family_of(config.model_type)
    layer_of = re.compile(rf"(?:^|\.){family.layers}\.(\d+)\.")
    heads = {"lm_head", *(stored.rstrip(".") for name, stored in family.renamed if name == "lm_head.")}
    before, layers, after, embedding = 0, [0] * int(config.num_hidden_layers), 0, 0
    with safe_open(model / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            count = math.prod(file.get_slice(name).get_shape())
            inside, parts = layer_of.search(name), name.split(".")
            if inside:
                layers[int(inside[1])] += count
            elif any(part in heads or part in family.final for part in parts):
                after += count
            else:
                before += count
                embedding += count if family.embeddings in parts else 0
    return before, layers, after + (embedding if config.tie_word_embeddings else 0)


def expected_elements(model: Path, span: tuple[int, int], gated: tuple[int, ...]) -> int:
    """Parameters that a stage of the decoder layers from `span[0]` up to `span[1]` computes with, its gates included.

    A whole model that ties its head to its embedding holds both in one.
    """
    before, layers, after = elements_per_part(model)
    config = AutoConfig.from_pretrained(model)
    first, last = span[0] == 0, span[1] == len(layers)
    whole = sum(layers[span[0] : span[1]]) + first * before + last * after
    if first and last and config.tie_word_embeddings:
        whole -= int(config.vocab_size) * int(config.hidden_size)
    gate = GATE_WIDTH * int(config.hidden_size) + 2 * GATE_WIDTH + 1
    return whole + gate * sum(span[0] <= layer < span[1] for layer in gated)
