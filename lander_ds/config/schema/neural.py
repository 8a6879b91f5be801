"""Neural metrics: `score.neural`, and `data.filters.quality`, which filters with one."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from pydantic.dataclasses import dataclass

from lander_ds.config.schema.types import PathText, PositiveInt
from lander_ds.config.strict import STRICT


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
class QualityConfig(NeuralConfig):
    """A metric without references that filters sentence pairs."""

    min: float = field(kw_only=True)
    """Sentence pairs that score lower are dropped."""
