"""The recipe: every option of every stage, typed. This file is the reference of what a recipe may say.

Field docstrings follow their field. Marks in brackets say where a choice comes from: (P) the LANDeRMT paper,
(I) inferred by this project, (R) a named ancestor. A number's range is part of its type, and pydantic checks types
and ranges whenever one of these classes is built. `lander_ds.config.loading` builds them from YAML;
`lander_ds.config.consistency` refuses combinations that cannot work.
"""

from __future__ import annotations

import os
import re
from dataclasses import field, replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic.dataclasses import dataclass

from lander_ds.config.strict import STRICT

PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Limit = Annotated[int, Field(ge=1), "remove it to use everything"]
"""The text is the cure that a message about the range ends with."""
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]

Topology = Literal["zero3", "replicated", "pipeline", "pipeline_zero3"]
Split = Literal["train", "detect", "valid", "test"]
CorpusFormat = Literal["auto", "jsonl", "tsv", "moses", "tmx", "hf"]
TextFormat = Literal["auto", "text", "jsonl", "hf"]

CHAT = "chat"
"""The prompt template of that name is the tokenizer's."""

SACREBLEU = "sacrebleu:"
"""A corpus path that begins so names a test set of sacreBLEU."""


def _at_home(path: str) -> str:
    """`path` with the home directory for a `~` or `~user` at its beginning.

    Raises:
        ValueError: there is no such user.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~") and not os.path.lexists(path):
        user = path.partition("/")[0]
        raise ValueError(
            f"{user} is no user's home directory; write the path out, or ./{user} for a name like that"
        )
    return expanded


PathText = Annotated[str, AfterValidator(_at_home)]
"""A path; `~` is the home directory."""


def _checkpoint_choice(text: str) -> str:
    if not re.fullmatch(r"last|best|step-[0-9]+", text):
        raise ValueError("expected last, best or step-N")
    return text


CheckpointChoice = Annotated[str, AfterValidator(_checkpoint_choice)]


def _once_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        return "loss" if value else "off"
    return value


KeepBest = Annotated[Literal["loss", "chrf", "off"], BeforeValidator(_once_boolean)]
"""Recipes and checkpoints of earlier versions say true for loss and false for off."""


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


@dataclass(frozen=True, config=STRICT)
class ColumnConfig:
    """Names of the columns: JSONL keys, TSV header names or 0-based numbers, HF columns; dots reach into
    nested ones."""

    src: str = "src"
    """Source text. `{src}`/`{tgt}` are replaced by language codes, e.g. `translation.{src}`."""
    tgt: str = "tgt"
    """Target text."""
    src_lang: str | None = None
    """When given: keep only rows whose value equals the pair's source language."""
    tgt_lang: str | None = None
    """When given: keep only rows whose value equals the pair's target language."""
    scores: tuple[str, ...] = ()
    """Columns with scores of the sentence pairs, e.g. of quality estimation, for `data.filters.min_score`. Every row must
    have a number in each."""

    @property
    def named(self) -> tuple[str, ...]:
        """Every column that is read."""
        return tuple(filter(None, (self.src, self.tgt, self.src_lang, self.tgt_lang, *self.scores)))


@dataclass(frozen=True, config=STRICT)
class CorpusConfig:
    """One corpus, or one family of corpora when `path` holds placeholders."""

    path: PathText
    """File, directory (HF data set) or Moses prefix. `{pair}`, `{src}`, `{tgt}` are filled in per pair. `sacrebleu:wmt23`: a
    test set of sacreBLEU, from its cache or downloaded by it."""
    split: Split = "train"
    """What the corpus is for. `detect` feeds the detect stage; without one it is cut from `train`."""
    format: CorpusFormat = "auto"
    """`auto` decides by the file name. Files may be plain, .gz, .bz2, .xz or .zst."""
    pairs: tuple[str, ...] = ()
    """Pairs this corpus serves; empty means all pairs of the recipe."""
    columns: ColumnConfig = field(default_factory=ColumnConfig)
    """Where the texts stand in each row."""
    swap: bool = False
    """Read the corpus backwards: a file for en-de serves de-en. Placeholders are filled with the languages
    swapped."""
    limit: Limit | None = None
    """Use at most this many sentence pairs of the corpus (the first ones that pass the filters)."""


@dataclass(frozen=True, config=STRICT)
class SetConfig(CorpusConfig):
    """A named test set: the keys of a corpus."""

    split: Literal["test", "valid"] = "test"
    """Which split of a Hugging Face data set is read. Other files have none."""
    pairs: tuple[str, ...] = ()
    """Directions to translate, also such as are not among `data.pairs`; empty means `data.pairs`."""


@dataclass(frozen=True, config=STRICT)
class FilterConfig:
    """Which sentence pairs are dropped. Each reason is counted and each dropped line recorded."""

    min_chars: Count = 1
    """Shorter sources or targets (after stripping) are dropped."""
    max_chars: PositiveInt = 2000
    """Longer sources or targets are dropped."""
    max_length_ratio: NonNegative = 6.0
    """Drop where the longer side has more than this many times the characters of the shorter (East Asian wide characters
    count three, fewer than 5 count 5). 0 switches it off."""
    drop_duplicates: bool = True
    """Keep the first of equal (source, target) pairs within a pair's split."""
    drop_identical: bool = True
    """Drop where source equals target."""
    test_overlap: Literal["off", "exact", "normalised"] = "normalised"
    """Drop training and detection pairs whose source or target also stands in valid or test.
    `normalised` compares NFKC, case-folded text without punctuation and white space."""
    min_score: dict[str, float] = field(default_factory=dict)
    """Drop sentence pairs that score lower, by column: `{qe: 0.8}`. It concerns corpora that name the column in
    `columns.scores`."""


@dataclass(frozen=True, config=STRICT)
class PromptConfig:
    """How a sentence becomes a prompt. The target follows directly after the prompt."""

    template: str = "{src_name}: {src}\n{tgt_name}:"
    """`{src}` source text, `{src_lang}`/`{tgt_lang}` codes, `{src_name}`/`{tgt_name}` language names. `chat`: the chat
    template of the tokenizer, for instruct models; few-shot examples are earlier turns, and the end of a turn ends a
    translation."""
    user: str = (
        "Translate the following text from {src_name} into {tgt_name}.\n{src_name}: {src}\n{tgt_name}:"
    )
    """`template: chat`: what the user says, with the placeholders of `template` (R, TowerInstruct)."""
    system: str = ""
    """`template: chat`: the system prompt, with the same placeholders but `{src}`; empty: none."""
    target_prefix: str = " "
    """Ends every prompt. Blanks at its end belong to the target, because tokenizers join a blank with the word behind
    it; everything before them is never translated."""
    separator: str = "\n\n"
    """Put between few-shot examples."""
    shots: Count = 0
    """Few-shot examples in front of every prompt, also in training (from the training split, seeded)."""
    language_names: dict[str, str] = field(default_factory=dict)
    """Overrides or additions to the built-in English names, e.g. `{de: German}`."""

    @property
    def chat(self) -> bool:
        """Whether the tokenizer's chat template writes the prompts."""
        return self.template == CHAT

    @property
    def request(self) -> str:
        """The template that the recipe writes the source into."""
        return self.user if self.chat else self.template


@dataclass(frozen=True, config=STRICT)
class TextColumnConfig:
    """Names of the columns: JSONL keys or HF columns; dots reach into nested ones. Files of plain text have none."""

    text: str = "text"
    """What the model learns to write."""
    prompt: str | None = None
    """What it reads before that, of instruction data; the answer begins on the next line, or, with `template: chat`, is the
    assistant's turn. Default: nothing."""


@dataclass(frozen=True, config=STRICT)
class TextCorpusConfig:
    """Monolingual text, or instructions with their answers."""

    path: PathText
    """File, or directory (HF data set)."""
    format: TextFormat = "auto"
    """`auto` decides by the file name; `text` has one text per line. Files may be plain, .gz, .bz2, .xz or .zst."""
    columns: TextColumnConfig = field(default_factory=TextColumnConfig)
    """Where the texts stand in each row."""
    limit: Limit | None = None
    """Use at most this many texts of the corpus (the first ones that are kept)."""


@dataclass(frozen=True, config=STRICT)
class ReplayConfig:
    """Text without a pair among the training data, so that the model keeps what it knows. It is trained through what all
    pairs own, the general banks and the gates."""

    share: ShareBelowOne = 0.0
    """Share of the tokens of a global batch, on average."""
    corpora: tuple[TextCorpusConfig, ...] = ()
    """Where the texts come from. Texts of which a line stands in valid or test (`data.filters.test_overlap`) and duplicates
    are dropped; of plain text, what is longer than `data.max_length` tokens is cut into pieces."""


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """Corpora and how they become token ids."""

    pairs: tuple[str, ...]
    """Translation directions, `en-de`: source `en`, target `de`."""
    corpora: tuple[CorpusConfig, ...]
    """Where the sentence pairs come from."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    """What is dropped."""
    prompt: PromptConfig = field(default_factory=PromptConfig)
    """What the model reads."""
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    """Text without a pair that is trained on as well."""
    max_length: Annotated[int, Field(ge=4)] = 256
    """Longest example in tokens, prompt and target together; longer ones are dropped and counted."""
    detect_examples: Count = 128
    """Sentence pairs per pair set aside from `train` for detection, when no corpus has `split: detect`."""
    cache_dir: PathText | None = None
    """Where tokenised corpora, hidden states (`train.prefix_cache`) and sentence scores (`score.neural`) are kept, by
    content hash. Default: `<run_dir>/cache`. Runs may share one."""
    workers: PositiveInt = 1
    """Processes that tokenise."""
    seed: Seed | None = None
    """Seed of what is cut off for detection and of few-shot examples. Default: the recipe's, from which runs that share
    their data but are trained with other seeds must be free."""


@dataclass(frozen=True, config=STRICT)
class DetectConfig:
    """The awareness pass."""

    examples: Limit | None = None
    """At most this many sentence pairs per pair; default all of the detection split."""
    batch_tokens: PositiveInt = 2048
    """Tokens per micro-batch. The result does not depend on it."""


@dataclass(frozen=True, config=STRICT)
class LayerChoice:
    """Which decoder layers are trained."""

    criterion: Literal["relevance", "awareness", "ends", "last", "random", "list", "all"] = "relevance"
    """`relevance`: largest D (P, eq. 1); `awareness`: largest total awareness (I); `ends`: the first and the last layers in
    turn, 0, L-1, 1, L-2, ... (I); others are ablations."""
    k: PositiveInt = 4
    """How many (P: 4). Ignored by `list` and `all`."""
    cost_aware: bool = False
    """`relevance` and `awareness`: take the k layers with the largest sum of scores per unit of step time, which grows
    with every layer that the backward pass goes down (I)."""
    scope: Literal["shared", "per_pair"] = "shared"
    """`shared`: one set from the mean over pairs (I). `per_pair`: each pair's own top k; it owns neurons only
    there."""
    layers: tuple[int, ...] = ()
    """The layers of `criterion: list`, counted from 0."""


@dataclass(frozen=True, config=STRICT)
class BankChoice:
    """How the neurons of a selected layer are divided into banks."""

    criterion: Literal["spread", "ratio", "entropy", "top", "random"] = "spread"
    """`spread` (P, threshold index I), `ratio` (R, Xie et al. 2021), `entropy` (R, Tang et al. 2024), `top` (I): the
    neurons with the most awareness over all chosen layers together, `random` control."""
    rho: Share = 0.9
    """Share of neurons that become general (P sweeps 0.5, 0.7, 0.9)."""
    spread: Literal["std", "cv"] = "std"
    """Spread over pairs of the normalised awareness: standard deviation, or divided by the mean (I)."""
    min_awareness: ShareBelowOne = 0.0
    """Quantile of least aware neurons that goes to the frozen bank first (I)."""
    kappa: Annotated[float, Field(gt=0, le=1)] = 0.7
    """`ratio`: a pair owns a neuron when its share exceeds kappa times the largest share (R)."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.05
    """`top`: share of the neurons of all chosen layers that each pair owns (I)."""
    quorum: Annotated[float, Field(gt=0, le=1)] = 0.75
    """`top`: a neuron is general when it is among the top of at least this share of the pairs, and of at least two (I)."""
    like: Literal["spread", "ratio", "entropy", "top"] = "spread"
    """`random`: the criterion whose layers and bank sizes it has."""
    owners: Literal["pair", "target", "source"] = "pair"
    """Who owns a specific bank: a pair, or all pairs with the same target or source language, whose awareness is then
    taken together before banks are chosen (I)."""


@dataclass(frozen=True, config=STRICT)
class ShieldConfig:
    """Neurons that stay frozen because something else needs them (I)."""

    awareness: PathText | None = None
    """`awareness.safetensors` that stage detect of another recipe made of the same base: of directions that are not trained,
    or of general text. None: no shield."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the neurons of all layers that is shielded: those with the largest part of that awareness."""


@dataclass(frozen=True, config=STRICT)
class SelectConfig:
    """From awareness to banks. Runs in seconds and needs no model."""

    layers: LayerChoice = field(default_factory=LayerChoice)
    """Which layers."""
    banks: BankChoice = field(default_factory=BankChoice)
    """Which neurons."""
    shield: ShieldConfig = field(default_factory=ShieldConfig)
    """Which neurons are left alone whatever the banks."""


@dataclass(frozen=True, config=STRICT)
class RoutingConfig:
    """The gates (conditional awareness-based routing)."""

    gate: Literal["input", "output", "none"] = "input"
    """What the gate scalars multiply: the FFN input (P), each bank's output, or nothing."""
    gate_init: Literal["preserve", "paper"] = "preserve"
    """`preserve` (I): c_G = 2c, c_S = 2(1-c), exactly 1 at step 0. `paper`: c_G = c, c_S = 1-c."""
    gate_eval: Literal["soft", "hard"] = "soft"
    """Gate at inference: the sigmoid, or rounded to 0/1 (R), which needs `gate_init: paper`."""
    hidden: PositiveInt = 128
    """Inner width of the gate network (R)."""
    alpha_max: NonNegative = 0.0
    """Noise on the gate logits grows linearly from 0 to this over training (R: up to 5)."""
    other_pairs: Literal["keep", "mask"] = "keep"
    """Neurons specific to other pairs stay in the forward pass, or are zeroed."""
    budget_weight: NonNegative = 0.0
    """Weight of the budget loss |mean(1-c) - p| (R)."""
    budget: Share = 0.5
    """p of the budget loss."""


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
class TrainConfig:
    """Selective fine-tuning and the baselines it is compared with."""

    method: Literal["lander", "full", "layers", "lora", "shira"] = "lander"
    """`lander`: banks and gates. Baselines: everything, the whole FFNs of the selected layers, LoRA, SHiRA."""
    banks: tuple[Literal["general", "specific"], ...] = ("general", "specific")
    """Which banks are trained (ablations `general-only`, `specific-only`)."""
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
    well. `loss`: lowest mean validation loss. `chrf`: highest mean chrF of the validation sentences, which every validation
    then translates greedily; not in pipelines. `off`: as `loss`, but none is kept for it."""
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

    systems: tuple[Literal["base", "fewshot", "trained"], ...] = ("base", "fewshot", "trained")
    """Untouched base zero-shot, base with examples in the prompt, the trained model."""
    split: Split = "test"
    """Which split is translated."""
    checkpoint: CheckpointChoice = "last"
    """What the system `trained` is: `last`, `best` (by `train.keep_best`) or `step-N`."""
    limit: Limit | None = None
    """At most this many sentences per pair (the first ones)."""
    shots: Count = 4
    """Examples in the prompt of the system `fewshot`."""
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
    """Where few-shot examples of directions outside `data.pairs` come from; without any, `fewshot` leaves such a
    direction out."""


@dataclass(frozen=True, config=STRICT)
class NeuralConfig:
    """A neural metric of the package unbabel-comet, which runs in an environment of its own."""

    model: PathText
    """Directory of a COMET model (`hparams.yaml`, `checkpoints/`), its checkpoint, or a hub id such as
    `Unbabel/wmt22-comet-da`, from the cache of huggingface_hub or downloaded into it. Checkpoints are pickles, which can run
    code: take them only from where you trust."""
    python: PathText | None = None
    """Python interpreter of an environment that has unbabel-comet. Default: that in the environment variable
    LANDER_COMET_PYTHON, or else the one that runs this program."""
    batch_size: PositiveInt = 16
    """Sentences scored together."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: the first GPU where there is one."""
    dtype: Literal["float32", "float16"] = "float32"
    """Type of the arithmetic. The command `comet-score` of unbabel-comet 2.2.7 computes in float16."""


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
    def decoding(self) -> TranslateConfig:
        """`translate` with the longest translation and the seed filled in."""
        longest = self.translate.max_new_tokens or self.data.max_length
        sampling = self.translate.sampling
        seed = self.seed if sampling.seed is None else sampling.seed
        return replace(self.translate, max_new_tokens=longest, sampling=replace(sampling, seed=seed))
