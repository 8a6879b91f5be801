"""Folding gates into the weights: a routed model as a dense one for one language pair, approximately.

A gate multiplies the FFN input of a token's banks (or their output) by a number that depends on the token. Its mean
over the tokens of a pair is a constant, and a constant factor of the input is one of the in-projections' rows (the
bias is added after it), a factor of the output one of the out-projection's columns (I). Banks that the gate leaves
alone for the pair, and neurons that are masked for it, are treated exactly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lander_ds.common.errors import ArtefactError
from lander_ds.export.pieces import shares
from lander_ds.export.sources import Scale, Scaled
from lander_ds.export.trained import TrainedModel
from lander_ds.models.routed_ffn import BankFFN
from lander_ds.models.surgery import banks_of, routed_ffns
from lander_ds.training.progress import Progress

MEAN = "mean"
"""In place of a pair: every bank's factor is its mean over all pairs."""

GateMeans = Mapping[str, Mapping[str, float]]
"""Layer (as text, for JSON) -> pair -> mean of c, the share of the general banks."""


def mean_gates(state: Mapping[str, Any], metrics: Path) -> dict[str, dict[str, float]]:
    """Mean gate values at the end of a training.

    Args:
        state: of the checkpoint.
        metrics: metrics.jsonl, where the values are that checkpoints before version 0.2 do not hold.
    """
    values = state.get("progress", {}).get("gates") or _from_metrics(metrics, state["step"])
    return {
        layer: {pair: sum(means) / len(means) for pair, means in of_layer.items()}
        for layer, of_layer in values.items()
    }


def _from_metrics(metrics: Path, step: int) -> dict[str, dict[str, list[float]]]:
    """What `Progress.gates` would hold at `step`."""
    progress = Progress()
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []:
        try:
            record = json.loads(line)
            if record["step"] <= step:
                progress.gated(record.get("gates", {}))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # a crash may have cut a line short
    return progress.gates


def folded(trained: TrainedModel, means: GateMeans, pair: str) -> Scaled:
    """The trained weights with the gates of `pair` as constants in them.

    Args:
        trained: a routed model.
        means: from `mean_gates`.
        pair: a pair of the model, or `MEAN`.

    Raises:
        ArtefactError: there are no mean values for a layer and pair.
    """
    assert trained.selection is not None
    pairs = trained.selection.pairs
    chosen = pairs if pair == MEAN else (pair,)
    scales: dict[str, list[Scale]] = {}
    for _, routed in routed_ffns(trained.model):
        gate = {one: _mean(trained, means, routed.layer, one) for one in chosen}
        for bank in banks_of(routed):
            factors = [_factors(trained, bank, pairs.index(one), gate[one]) for one in chosen]
            inner, outer = (sum(values) / len(chosen) for values in zip(*factors, strict=True))
            for role, factor in (("up", inner), ("gate", inner), ("down", outer)):
                parameter = getattr(bank, role)
                if parameter is not None and factor != 1.0:
                    cut = parameter.lander_slice
                    stored = trained.stored_name(cut.tensor)
                    for share in shares(cut, stored, trained.weights.pieces(stored)):
                        assert share.cut.dim is not None
                        scale = Scale(share.cut.dim, share.cut.neurons, factor)
                        scales.setdefault(share.stored, []).append(scale)
    return Scaled(trained.source, scales)


def _mean(trained: TrainedModel, means: GateMeans, layer: int, pair: str) -> float:
    """c of a layer and pair as the model would use it; 0.5 where there is no gate."""
    if trained.routing.gate == "none":
        return 0.5
    try:
        value = means[str(layer)][pair]
    except KeyError:
        raise ArtefactError(
            f"the checkpoint has no mean gate value of {pair} in layer {layer}: only pairs that were trained can be "
            "folded; leave the pair out of export.fold"
        ) from None
    return float(value >= 0.5) if trained.routing.gate_eval == "hard" else value


def _factors(trained: TrainedModel, bank: BankFFN, pair: int, c: float) -> tuple[float, float]:
    """Factors of a bank's in-projections and of its out-projection for a pair."""
    routing = trained.routing
    owned = pair in bank.owners
    kept = 0.0 if bank.kind == "specific" and routing.other_pairs == "mask" and not owned else 1.0
    if bank.kind == "frozen" or routing.gate == "none" or not owned:
        return 1.0, kept
    share = c if bank.kind == "general" else 1.0 - c
    factor = 2.0 * share if routing.gate_init == "preserve" else share
    return (factor, kept) if routing.gate == "input" else (1.0, factor * kept)


def folds_of(trained: TrainedModel, wanted: Sequence[str]) -> tuple[str, ...]:
    """`wanted` pairs, checked.

    Raises:
        ArtefactError: the model has no gates, or does not know a pair.
    """
    known: tuple[str, ...] = () if trained.selection is None else trained.selection.pairs
    if wanted and not trained.pairs_differ:
        raise ArtefactError("this model has no gates: its dense form is exact, there is nothing to fold")
    for pair in wanted:
        if pair not in (*known, MEAN):
            raise ArtefactError(f"the model has no pair {pair}: fold one of {', '.join(known)}, or {MEAN}")
    return tuple(wanted)
