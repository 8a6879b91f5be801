"""What every system of the step benchmark trains on: the same tokens in the same batches on the same ranks.

Examples are random token ids, all of one length, half prompt and half target: nothing has to be padded, so that no
system is timed on tokens that another one does not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from lander_ds.common.files import json_hash
from lander_ds.data.batching.examples import examples
from lander_ds.data.batching.packing import Example
from lander_ds.data.batching.plan import BatchPlan, cut
from lander_ds.data.prepared import PreparedData, PreparedSplit

PAIRS = ("en-de", "en-fr", "en-ru", "en-cs")
EXAMPLES_PER_PAIR = 256


@dataclass(frozen=True)
class Workload:
    """Everything that is the same for all systems."""

    model: str
    """HF model directory."""
    deepspeed: str
    """DeepSpeed JSON, given to every system as it is."""
    dtype: str
    """Type of weights and arithmetic."""
    ranks: int
    """Data-parallel ranks."""
    tokens: int
    """Tokens per rank and step, prompt and target."""
    length: int
    """Tokens of an example."""
    layers: tuple[int, ...]
    """Decoder layers that `lander` trains."""
    vocabulary: int
    """Size of the model's vocabulary."""
    steps: int
    """Steps of every system, warm-up included."""
    seed: int = 1
    """Of the token ids, the order of the examples, and new weights."""
    learning_rate: float = 1e-5
    """Of every parameter."""
    pairs: tuple[str, ...] = PAIRS
    """Language pairs; an equal share of the examples is of each."""

    @property
    def prompt(self) -> int:
        """Prompt tokens of an example."""
        return self.length // 2

    @property
    def examples(self) -> int:
        """Examples per rank and step."""
        return self.tokens // self.length

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a global batch."""
        return self.ranks * self.tokens

    @property
    def target_tokens_per_step(self) -> int:
        """Tokens of a global batch that carry loss."""
        return self.ranks * self.examples * (self.length - self.prompt)

    def data(self) -> PreparedData:
        """The corpora."""
        return UniformData(self)

    def plan(self, splits: Sequence[PreparedSplit]) -> BatchPlan:
        """The global batches of this trainer, from the training splits of all pairs."""
        return BatchPlan(
            [split.lengths for split in splits],
            [split.target_lengths for split in splits],
            batch_tokens=self.tokens_per_step,
            temperature=1.0,
            seed=self.seed,
        )

    def in_order(self) -> list[Example]:
        """The examples as they are trained: by step, then by rank."""
        splits = list(self.data().split("train").values())
        plan = self.plan(splits)
        ordered: list[Example] = []
        for step in range(self.steps):
            batch = plan.batch(step)
            for (positions,) in cut(batch, self.ranks, micro_batches=1):
                ordered += examples(batch, positions, splits)
        return ordered


class UniformSplit(PreparedSplit):
    """Training examples of one pair, made up instead of read."""

    def __init__(self, pair: str, workload: Workload) -> None:
        self.pair, self.split = pair, "train"
        self.lengths = np.full(EXAMPLES_PER_PAIR, workload.length, dtype=np.int32)
        self.target_lengths = self.lengths - workload.prompt
        self._prompt = workload.prompt
        generator = np.random.default_rng([workload.seed, workload.pairs.index(pair)])
        # The first ids are those of special tokens in most vocabularies.
        shape = (EXAMPLES_PER_PAIR, workload.length)
        self._ids = generator.integers(min(8, workload.vocabulary - 1), workload.vocabulary, shape, np.int32)

    def tokens(self, index: int) -> tuple[np.ndarray, int]:
        """Token ids [length] int32 and the length of the prompt."""
        return self._ids[index], self._prompt


class UniformData(PreparedData):
    """Made-up training data of every pair, and no other split."""

    def __init__(self, workload: Workload) -> None:
        self.pairs, self._workload = workload.pairs, workload
        self._train = {pair: UniformSplit(pair, workload) for pair in workload.pairs}

    def content_hash(self, *splits: str) -> str:
        """Of everything that the examples follow from."""
        return json_hash([asdict(self._workload), splits])

    def split(self, split: str) -> dict[str, PreparedSplit]:
        """The training split of every pair; other splits are empty."""
        return dict(self._train) if split == "train" else {}


def chosen_layers(text: str, count: int, k: int = 4) -> tuple[int, ...]:
    """The decoder layers that `--layers` means: `middle` or `last` (k of them), or numbers from 0 with commas.

    Raises:
        ValueError: not one of these, or not a layer of a model with `count` layers.
    """
    k = min(k, count)
    if text in ("middle", "last"):
        first = (count - k) // 2 if text == "middle" else count - k
        return tuple(range(first, first + k))
    try:
        layers = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise ValueError(f"{text!r} is neither middle nor last nor layer numbers such as 0,3,10") from None
    if layers[0] < 0 or layers[-1] >= count:
        raise ValueError(f"{text!r}: the model has layers 0 to {count - 1}")
    return layers
