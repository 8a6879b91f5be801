"""Which decoder layers are trained, and for which pairs: pure functions of the awareness."""

from __future__ import annotations

import numpy as np
import torch

from lander_ds.common.errors import ConfigError
from lander_ds.config.schema.method import LayerChoice
from lander_ds.method.awareness import Awareness
from lander_ds.method.relevance import relevance


def choose_layers(awareness: Awareness, choice: LayerChoice, seed: int) -> dict[int, tuple[str, ...]]:
    """The selected layers, ascending, each with the pairs that selected it (in the awareness's order).

    With `scope: shared` every pair selects the k layers with the largest mean score over pairs (I); with
    `per_pair` each pair its own k (I). Equal scores: the lower layer first. `list` and `all` give every layer
    to every pair.

    Raises:
        ConfigError: more layers are asked for than can be chosen, or `select.layers.layers` is wrong.
    """
    if choice.criterion == "list":
        return dict.fromkeys(_listed(choice.layers, awareness.layers), awareness.pairs)
    if choice.criterion == "all":
        return dict.fromkeys(range(awareness.layers), awareness.pairs)
    scores = layer_scores(awareness, choice.criterion, seed)
    if not 1 <= choice.k <= scores.shape[1]:
        why = " (the last layer has no next layer to differ from)" if choice.criterion == "relevance" else ""
        raise ConfigError(
            f"select.layers.k is {choice.k}, but criterion {choice.criterion} can choose from 1 to "
            f"{scores.shape[1]} of the model's {awareness.layers} layers{why}: change k, "
            f"or select.layers.criterion"
        )

    def best(row: torch.Tensor) -> list[int]:
        return _top_for_time(row, choice.k, awareness.layers) if choice.cost_aware else _top(row, choice.k)

    if choice.scope == "shared":
        return dict.fromkeys(sorted(best(scores.mean(0))), awareness.pairs)
    top = [set(best(row)) for row in scores]
    return {
        layer: tuple(pair for pair, own in zip(awareness.pairs, top, strict=True) if layer in own)
        for layer in sorted(set().union(*top))
    }


def layer_scores(awareness: Awareness, criterion: str, seed: int) -> torch.Tensor:
    """Scores by which layers are ranked: [M, number of layers that can be chosen] float64.

    `relevance`: D (P, eq. 1). `awareness`: the layer's share of the pair's total awareness, so that no pair
    dominates the mean (I). `ends`: nearness to either end, the lower end first (I). `last`: the layer's index.
    `random`: uniform numbers of (seed,).
    """
    if criterion == "relevance":
        return relevance(awareness)
    if criterion == "awareness":
        total = awareness.phi().sum(-1)
        return torch.nan_to_num(total / total.sum(-1, keepdim=True))
    size = (len(awareness.pairs), awareness.layers)
    if criterion == "ends":
        index = torch.arange(size[1], dtype=torch.float64)
        return -torch.minimum(2 * index, 2 * (size[1] - 1 - index) + 1).expand(size)
    if criterion == "last":
        return torch.arange(size[1], dtype=torch.float64).expand(size)
    return torch.from_numpy(np.random.default_rng(seed % 2**64).random(size))


def _top(scores: torch.Tensor, k: int) -> list[int]:
    return torch.sort(scores, descending=True, stable=True).indices[:k].tolist()


def _top_for_time(scores: torch.Tensor, k: int, layers: int) -> list[int]:
    """The k layers with the largest sum of scores per step time (I).

    A step goes forward through all L layers and backward through those from the lowest trained one, b, upwards: time is
    2 L - b, in units of one layer's forward pass. Head and weight gradients are left out, being the same for every
    choice of k layers. For every b the best k layers from b on are looked at; of equal ratios the higher b is taken.

    Args:
        scores: [n] of the layers that can be chosen, not negative.
        k: how many, at most n.
        layers: L.
    """

    def per_time(lowest: int) -> tuple[float, int]:
        chosen = scores[lowest:].sort(descending=True).values[:k]
        return float(chosen.sum()) / (2 * layers - lowest), lowest

    lowest = max(range(len(scores) - k + 1), key=per_time)
    return [lowest + layer for layer in _top(scores[lowest:], k)]


def _listed(layers: tuple[int, ...], count: int) -> list[int]:
    if not layers:
        raise ConfigError(
            "select.layers.layers is empty: list the layers that select.layers.criterion: list selects"
        )
    if wrong := [layer for layer in layers if not 0 <= layer < count]:
        raise ConfigError(
            f"select.layers.layers names layer {wrong[0]}, but the model has the layers 0 to "
            f"{count - 1}: correct the list"
        )
    if len(set(layers)) < len(layers):
        raise ConfigError(f"select.layers.layers names a layer twice ({list(layers)}): list each layer once")
    return sorted(layers)
