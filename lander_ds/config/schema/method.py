"""The sections `detect`, `select` and `routing`: which neurons are trained, and for whom."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from lander_ds.config.schema.types import Limit, NonNegative, PathText, PositiveInt, Share, ShareBelowOne
from lander_ds.config.strict import STRICT


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
