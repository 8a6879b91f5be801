"""The section `data`: corpora, filters, the prompt, replay."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from lander_ds.config.schema.neural import QualityConfig
from lander_ds.config.schema.types import (
    Count,
    Limit,
    NonNegative,
    PathText,
    PositiveInt,
    Seed,
    ShareBelowOne,
    Split,
)
from lander_ds.config.strict import STRICT

CorpusFormat = Literal["auto", "jsonl", "tsv", "moses", "tmx", "hf"]
TextFormat = Literal["auto", "text", "jsonl", "hf"]

CHAT = "chat"
"""The prompt template of that name is the tokenizer's."""

SACREBLEU = "sacrebleu:"
"""A corpus path that begins so names a test set of sacreBLEU."""


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

    doc: str | None = None
    """The document that a row belongs to; lines of a document stand behind one another, and rows without one alone. For
    `data.prompt.context`, and for scores of whole documents."""

    rejected: str | None = None
    """A worse translation than `tgt`, for `train.objective: cpo`."""

    @property
    def texts(self) -> tuple[str, ...]:
        """Columns that every row must have, but for those of scores and languages."""
        return tuple(filter(None, (self.src, self.tgt, self.doc, self.rejected)))

    @property
    def named(self) -> tuple[str, ...]:
        """Every column that is read."""
        return (*self.texts, *filter(None, (self.src_lang, self.tgt_lang)), *self.scores)


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
    quality: dict[str, QualityConfig] = field(default_factory=dict)
    """Drop training and detection pairs by metrics without references, by name: `{kiwi: {model:
    Unbabel/wmt22-cometkiwi-da, min: 0.7}}`. They see what passes the other filters, on the first rank; examples of prompts
    (`data.prompt.shots`) are chosen before."""


@dataclass(frozen=True, config=STRICT)
class PromptConfig:
    """How a sentence becomes a prompt. The target follows directly after the prompt."""

    template: str = "{src_name}: {src}\n{tgt_name}:"
    """`{src}` source text, `{src_lang}`/`{tgt_lang}` codes, `{src_name}`/`{tgt_name}` language names; `{context}`: see
    `context`. `chat`: the chat
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
    context: Count = 0
    """So many source sentences before the one to translate, of the same document (`columns.doc`; of sacreBLEU's sets their
    own), stand where the template says `{context}`. Examples that are shown have none."""
    context_template: str = "{context}\n"
    """What is written for `{context}`; nothing at the beginning of a document."""
    context_separator: str = " "
    """Put between the sentences of a context."""
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
