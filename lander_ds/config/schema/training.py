"""The section `train`, with the baselines' own options."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator
from pydantic.dataclasses import dataclass

from lander_ds.config.schema.types import (
    Count,
    Limit,
    NonNegative,
    PathText,
    Positive,
    PositiveInt,
    Share,
    ShareBelowOne,
)
from lander_ds.config.strict import STRICT


def _once_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        return "loss" if value else "off"
    return value


KeepBest = Annotated[str, BeforeValidator(_once_boolean)]
"""Recipes and checkpoints of earlier versions say true for loss and false for off."""


@dataclass(frozen=True, config=STRICT)
class LearningRates:
    """Peak learning rate per parameter group."""

    general: NonNegative = 2e-5
    """General banks."""
    specific: NonNegative = 2e-5
    """Specific banks."""
    gates: NonNegative = 2e-4
    """Gates."""
    dense: NonNegative = 2e-5
    """Whole tensors, of the baselines `full` and `layers`."""
    lora: NonNegative = 1e-3
    """Adapters of the baseline `lora`."""
    shira: NonNegative = 2e-4
    """Entries of the baseline `shira` (I)."""


@dataclass(frozen=True, config=STRICT)
class LoraConfig:
    """The LoRA baseline (through PEFT)."""

    r: PositiveInt = 16
    """Rank."""
    alpha: Positive = 32.0
    """Scale: alpha / r."""
    dropout: ShareBelowOne = 0.0
    """Dropout on the adapter input."""


@dataclass(frozen=True, config=STRICT)
class ShiraConfig:
    """The SHiRA baseline (R, Bhardwaj et al. 2024): single entries of the same matrices, trained in place."""

    r: PositiveInt = 16
    """As many entries as LoRA of this rank would train: r (in + out) per matrix, drawn at random."""


@dataclass(frozen=True, config=STRICT)
class AverageConfig:
    """Averaging of what is trained, in float32; translated and exported is the average."""

    last: Count = 0
    """Mean of the trained weights after each of the last so many steps; 0: no averaging. It takes 4 bytes per trained
    parameter."""


@dataclass(frozen=True, config=STRICT)
class CpoConfig:
    """Contrastive preference optimisation (R, Xu et al. 2024), without a reference model."""

    beta: Positive = 0.1
    """Factor of the difference of the log-likelihoods of both translations, which are sums over tokens."""
    likelihood: NonNegative = 1.0
    """Weight of the loss of the chosen translations, the mean over their tokens, beside that of the preferences, the mean
    over examples."""


@dataclass(frozen=True, config=STRICT)
class TrainConfig:
    """Selective fine-tuning and the baselines it is compared with."""

    method: Literal["lander", "full", "layers", "lora", "shira"] = "lander"
    """`lander`: banks and gates. Baselines: everything, the whole FFNs of the selected layers, LoRA, SHiRA."""
    banks: tuple[Literal["general", "specific"], ...] = ("general", "specific")
    """Which banks are trained (ablations `general-only`, `specific-only`)."""
    objective: Literal["likelihood", "cpo"] = "likelihood"
    """`likelihood`: translations are made likelier. `cpo`: and likelier than the ones in `columns.rejected`."""
    cpo: CpoConfig = field(default_factory=CpoConfig)
    """Only for `objective: cpo`."""
    start_from: PathText | None = None
    """Start with what an earlier run trained: its run directory, or one of its checkpoints (`RUN/checkpoints/step-N`). Base,
    pairs, method and gates must be the same; stage select takes over its selection, and detect is not needed. None: start
    from the base."""
    steps: PositiveInt = 1000
    """Optimizer steps."""
    batch_tokens: PositiveInt = 16384
    """Token budget of a global batch: prompt and target tokens over all ranks and micro-batches."""
    micro_batch: PositiveInt = 1
    """Packed sequences of `pack_tokens` per micro-batch and rank. Changes memory and speed, not results."""
    pack_tokens: PositiveInt = 1024
    """Token capacity of one packed sequence."""
    activation_checkpointing: bool = False
    """Recompute every decoder layer's activations in the backward pass: less memory, about a third more
    compute. Changes no result."""
    prefix_cache: Literal["off", "disk"] = "off"
    """`disk`: what comes out of the layers below the lowest trained one is computed once per training example, before
    the first step, and kept under `data.cache_dir` (in the type of the model). Worth it from the second pass over the
    data on, and in runs that share the cache. Not in pipelines."""
    temperature: Positive = 1.0
    """Pairs are sampled in proportion to size ** (1 / temperature)."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or plain SGD for numerical comparisons."""
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.95)
    """AdamW moments."""
    eps: Positive = 1e-8
    """AdamW epsilon."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    lr: LearningRates = field(default_factory=LearningRates)
    """Learning rates."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape after warm-up; linear and cosine end at `min_lr_ratio`."""
    warmup_steps: Count = 0
    """Steps of linear warm-up."""
    min_lr_ratio: Share = 0.0
    """Final learning rate over peak."""
    clip: NonNegative = 1.0
    """Global gradient norm; 0 switches clipping off."""
    valid_every: Count = 0
    """Validation loss per pair every so many steps; 0: only at the end."""
    valid_examples: Limit | None = None
    """At most this many validation sentences per pair."""
    patience: Count = 0
    """Stop after so many validations without improvement by the criterion of `keep_best`; 0 never stops early."""
    save_every: Count = 0
    """Checkpoint every so many steps; there is always one at the end."""
    save_in_background: bool = True
    """Go on training while a checkpoint is being written."""
    keep_last: Count = 0
    """Keep only the newest so many checkpoints; 0 keeps all."""
    keep_every: Count = 0
    """With `keep_last`: also keep checkpoints whose step is a multiple of this; 0: none."""
    keep_best: KeepBest = "loss"
    """Which checkpoint is the best: for `patience`, for `checkpoint: best`, and, with `keep_last`, which one is kept as
    well. `loss`: lowest mean validation loss. `chrf`, or the name of a metric in `score.neural`: highest mean score of the
    validation sentences, which every validation then translates greedily; not in pipelines. `off`: as `loss`, but none is
    kept for it."""
    max_skipped: Count = 10
    """Steps whose loss or gradients are not finite are skipped and counted; stop after so many in a row."""
    stall_seconds: NonNegative = 1800.0
    """End the job when no step has finished for so long (in detect: no micro-batch), and name the rank that hangs; 0
    waits for ever."""
    log_every: PositiveInt = 1
    """Figures go to the trackers every so many steps; metrics.jsonl has every step."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Where figures go besides metrics.jsonl. Weights & Biases and MLflow need their own packages
    (`pip install 'lander-ds[track]'`) and read their own environment variables; what fails once training runs is left
    out with a warning."""
    average: AverageConfig = field(default_factory=AverageConfig)
    """Averaging over steps."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Only for `method: lora`."""
    shira: ShiraConfig = field(default_factory=ShiraConfig)
    """Only for `method: shira`."""

    @property
    def translated_metric(self) -> str | None:
        """The metric of translations that validations go by: `chrf`, or one of `score.neural`; None: the loss."""
        return None if self.keep_best in ("loss", "off") else self.keep_best
