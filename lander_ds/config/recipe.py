"""The recipe: every option of every stage, typed. It and the sections in `lander_ds.config.schema` are the reference of
what a recipe may say.

Field docstrings follow their field. Marks in brackets say where a choice comes from: (P) the LANDeRMT paper,
(I) inferred by this project, (R) a named ancestor. A number's range is part of its type, and pydantic checks types
and ranges whenever one of these classes is built. `lander_ds.config.loading` builds them from YAML;
`lander_ds.config.consistency` refuses combinations that cannot work.
"""

from __future__ import annotations

from dataclasses import field, replace
from typing import Literal

from pydantic.dataclasses import dataclass

from lander_ds.config.schema.data import DataConfig
from lander_ds.config.schema.method import DetectConfig, RoutingConfig, SelectConfig
from lander_ds.config.schema.results import EvaluateConfig, ExportConfig, ScoreConfig, TranslateConfig
from lander_ds.config.schema.training import TrainConfig
from lander_ds.config.schema.types import PathText, PositiveInt, Quantization, Seed
from lander_ds.config.strict import STRICT

Topology = Literal["zero3", "replicated", "pipeline", "pipeline_zero3"]
FrozenShards = Literal["world", "node"]


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """The base model."""

    path: PathText
    """HF model directory (config.json, safetensors, tokenizer), or a hub id such as `google/gemma-3-270m`, from the cache of
    huggingface_hub or downloaded into it."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; only a commit always means the same weights. Default: the main branch."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the weights and of the arithmetic. The optimizer always keeps float32 masters."""
    trust_remote_code: bool = False
    """Run Python code that the model directory ships. Only for directories whose code has been read."""
    allow_pickle: bool = False
    """Open weights that are PyTorch pickles (pytorch_model.bin), where there are no safetensors. Nothing but tensors is
    taken from them, but only safetensors cannot run code by design."""
    quantize: Quantization | None = None
    """Frozen projections of the decoder layers in 8 bits (`int8`) or 4 (`nf4`: R, Dettmers et al. 2023) while detecting and
    training; what is trained, embedding, head and norms keep `dtype`. Translations and exports are of the unquantised
    base. Topologies `replicated` and `pipeline`, methods `lander` and `lora`; needs bitsandbytes
    (`pip install 'lander-ds[quantize]'`)."""

    @property
    def numerics(self) -> dict[str, str]:
        """What detection and training depend on besides the base's weights; without `quantize` as before it existed."""
        return {"dtype": self.dtype, **({"quantize": self.quantize} if self.quantize else {})}


@dataclass(frozen=True, config=STRICT)
class Recipe:
    """Everything that a run needs to know."""

    run_dir: PathText
    """Where every artefact of the run is written."""
    model: ModelConfig
    """The base model."""
    data: DataConfig
    """The corpora."""
    deepspeed: PathText
    """DeepSpeed JSON (`ds_configs/<size>/<topology>.json`)."""
    topology: Topology = "zero3"
    """`zero3`: every weight sharded over all ranks. `replicated`: every rank holds the whole model, ZeRO-1 shards the
    optimizer state. `pipeline`: every rank holds whole layers, ZeRO-1 shards the optimizer state. `pipeline_zero3`:
    ZeRO-3 inside every pipeline stage (I)."""
    frozen_shards: FrozenShards = "world"
    """Over which ranks ZeRO-3 shards frozen weights. `world`: over all, as what is trained. `node`: over those of one
    machine, so that every machine holds a whole copy and frozen weights do not travel between machines (R: hpZ of ZeRO++).
    In `pipeline_zero3` both within the pipeline stage."""
    pipeline_stages: PositiveInt = 1
    """Stages of a pipeline topology; the number of ranks must be a multiple."""
    pipeline_cut: tuple[int, ...] = ()
    """First decoder layer of every pipeline stage but the first, e.g. [6, 12] for three stages; empty: balanced by
    compute."""
    seed: Seed = 1
    """Seed of everything random."""
    detect: DetectConfig = field(default_factory=DetectConfig)
    """Options of stage detect."""
    select: SelectConfig = field(default_factory=SelectConfig)
    """Options of stage select."""
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    """Options of the gates."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Options of stage train."""
    translate: TranslateConfig = field(default_factory=TranslateConfig)
    """Options of stage translate."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Named test sets."""
    score: ScoreConfig = field(default_factory=ScoreConfig)
    """Options of stage score."""
    export: ExportConfig = field(default_factory=ExportConfig)
    """Options of stage export."""

    @property
    def data_seed(self) -> int:
        """`data.seed`, or the recipe's."""
        return self.seed if self.data.seed is None else self.data.seed

    @property
    def pipelined(self) -> bool:
        """Whether the topology cuts the model into pipeline stages."""
        return self.topology in ("pipeline", "pipeline_zero3")

    @property
    def sharded(self) -> bool:
        """Whether the topology shards weights (ZeRO-3)."""
        return self.topology in ("zero3", "pipeline_zero3")

    @property
    def decoding(self) -> TranslateConfig:
        """`translate` with the longest translation and the seed filled in."""
        longest = self.translate.max_new_tokens or self.data.max_length
        sampling = self.translate.sampling
        seed = self.seed if sampling.seed is None else sampling.seed
        return replace(self.translate, max_new_tokens=longest, sampling=replace(sampling, seed=seed))
