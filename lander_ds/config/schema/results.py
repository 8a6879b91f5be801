"""The sections after training: `translate`, `evaluate`, `score` and `export`."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from lander_ds.config.schema.data import CorpusConfig
from lander_ds.config.schema.neural import NeuralConfig
from lander_ds.config.schema.types import (
    CheckpointChoice,
    Count,
    Limit,
    NonNegative,
    PathText,
    Positive,
    PositiveInt,
    Seed,
    Split,
    System,
)
from lander_ds.config.strict import STRICT


@dataclass(frozen=True, config=STRICT)
class SetConfig(CorpusConfig):
    """A named test set: the keys of a corpus."""

    split: Literal["test", "valid"] = "test"
    """Which split of a Hugging Face data set is read. Other files have none."""
    pairs: tuple[str, ...] = ()
    """Directions to translate, also such as are not among `data.pairs`; empty means `data.pairs`."""


@dataclass(frozen=True, config=STRICT)
class SamplingConfig:
    """Drawing translations instead of searching for the best one. What is drawn for a sentence depends on the seed, its
    prompt and the number of the sample alone."""

    temperature: NonNegative = 0.0
    """0: no sampling. 1 draws from the model's own probabilities, less prefers likely tokens."""
    top_k: Count = 0
    """Draw among the so many most likely tokens; 0: among all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw among the most likely tokens whose probabilities add up to this."""
    seed: Seed | None = None
    """Another seed draws other translations. Default: the recipe's."""


@dataclass(frozen=True, config=STRICT)
class TranslateConfig:
    """Decoding of the test split."""

    systems: tuple[System, ...] = ("base", "fewshot", "trained")
    """Untouched base zero-shot, base with examples in the prompt, the trained model, and that with examples too."""
    split: Split = "test"
    """Which split is translated."""
    checkpoint: CheckpointChoice = "last"
    """What the systems `trained` and `trained_fewshot` are: `last`, `best` (by `train.keep_best`) or `step-N`."""
    limit: Limit | None = None
    """At most this many sentences per pair (the first ones)."""
    shots: Count = 4
    """Examples in the prompts of the systems `fewshot` and `trained_fewshot`."""
    beams: PositiveInt = 1
    """1 is greedy search."""
    length_penalty: Annotated[float, Field(ge=-100, le=100)] = 1.0
    """Exponent of the length in scores: those that beam search goes by, and those that are written with several samples."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Sampling in place of greedy search."""
    batch_size: PositiveInt = 16
    """Sentences decoded together on a rank."""
    max_new_tokens: PositiveInt | None = None
    """Longest translation in tokens; longer ones are cut short and counted as `truncated`. Default: `data.max_length`,
    which no prepared example exceeds."""
    weights: Literal["replicated", "sharded"] = "replicated"
    """Every rank holds the model, or ZeRO-3 shards it (for models that do not fit on one device)."""


@dataclass(frozen=True, config=STRICT)
class EvaluateConfig:
    """Further test sets: what the model learned, kept and forgot. They change nothing that is trained on."""

    sets: dict[str, SetConfig] = field(default_factory=dict)
    """Test sets by name, `news: {path: "news/{pair}.jsonl", pairs: [en-de, en-es]}`, or `wmt: {path: "sacrebleu:wmt23",
    pairs: [en-de]}`, with the filters and the prompt of `data`. Sentences that stand in the training data are left out
    of the set (`data.filters.test_overlap`)."""
    shots: tuple[CorpusConfig, ...] = ()
    """Where few-shot examples of directions outside `data.pairs` come from; without any, `fewshot` and
    `trained_fewshot` leave such a direction out."""
    systems: tuple[System, ...] | None = None
    """The systems that translate the sets. Default: `translate.systems`."""


@dataclass(frozen=True, config=STRICT)
class ScoreConfig:
    """Automatic metrics."""

    bootstrap_samples: PositiveInt = 1000
    """Resamples of the paired bootstrap."""
    baseline: PathText | None = None
    """Another system's translations, scored too; p-values are then against it instead of `base`. One file per
    pair (`{pair}`, `{src}`, `{tgt}` are filled in): JSON lines with `id` and `hyp` as in translations/, or
    text with one translation per line."""
    ter: bool = True
    """Also compute TER."""
    tokenizers: dict[str, str] = field(default_factory=dict)
    """sacreBLEU tokenizer per target language where the default is not wanted, e.g. `{ja: char}`."""
    neural: dict[str, NeuralConfig] = field(default_factory=dict)
    """Neural metrics by name, `comet: {model: Unbabel/wmt22-comet-da}`, with references or without (quality
    estimation)."""


@dataclass(frozen=True, config=STRICT)
class ExportConfig:
    """HF directories made from the trained model."""

    formats: tuple[Literal["dense", "routed", "delta"], ...] = ("routed",)
    """`routed`: exact, ships its own modelling file. `dense`: standard architecture, exact without gates. `delta`:
    only what differs from the base, for `lander delta`; exact both ways."""
    checkpoint: CheckpointChoice = "last"
    """What is exported: `last`, `best` (by `train.keep_best`) or `step-N`."""
    fold: tuple[str, ...] = ()
    """Pairs, or `mean`, for each of which `dense-PAIR` is written too: a standard architecture with that pair's mean
    gates folded into the weights (I). An approximation."""
    fold_sentences: Count = 100
    """Sentences per folded pair on which BLEU and chrF of the folded export are compared with the routed model's; 0
    skips it."""
    dtype: Literal["model", "bfloat16", "float16", "float32"] = "model"
    """Type of the exported weights; `model` keeps the base's, as a delta always does."""
    shard_size: Positive | None = None
    """Largest weight file in gigabytes (10^9 bytes). Default: the base's own files for `dense`, 5 for `routed`."""
    verify: Count = 2
    """Sentences per pair on which each export is compared with the trained model (logits in float32 and
    greedy translations); 0 skips it. Needs memory for two copies of the model."""
