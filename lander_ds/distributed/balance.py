"""Where to cut a model into pipeline stages so that the slowest one is as fast as possible (I).

DeepSpeed's `partition_method: parameters` counts trained parameters alone, which says little of a mostly frozen
model. Here a cost is the matrix elements that a token is multiplied by (two FLOPs each): every layer once forward;
from the lowest trained layer upwards once more for the gradient of its input; trained elements once more for their own
gradient; with recomputation the layers that have a backward pass once more forward. The head is the same on the
target tokens. Left out: the part of attention that grows with the length of examples, which is the same in every layer
of most models; norms; the embedding, which is a lookup.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from torch import nn


def costs_of(
    layers: nn.ModuleList, head: nn.Parameter, recompute: bool, everything: bool = False
) -> tuple[list[int], int]:
    """Multiplications per token of every decoder layer, and of the head.

    Args:
        layers: after surgery, trained parameters marked; may be on meta.
        head: [V, d].
        recompute: activations are recomputed in the backward pass.
        everything: gradients go down to the embedding although nothing is trained, and nothing is recomputed
            (detection).
    """
    weights = [[p for p in layer.parameters() if p.dim() > 1] for layer in layers]
    costs = layer_costs(
        [sum(p.numel() for p in matrices) for matrices in weights],
        [sum(p.numel() for p in matrices if p.requires_grad) for matrices in weights],
        recompute=recompute and not everything,
        first_backward=0 if everything else None,
    )
    return costs, head_cost(head.numel(), head.requires_grad)


def layer_costs(
    parameters: Sequence[int],
    trained: Sequence[int],
    recompute: bool = False,
    first_backward: int | None = None,
) -> list[int]:
    """Multiplications per token of every decoder layer, forward and backward.

    Args:
        parameters: matrix elements of every layer.
        trained: those among them that are trained.
        recompute: activations are recomputed in the backward pass.
        first_backward: lowest layer that the gradient reaches, where it is not the lowest with something trained (in
            detection nothing is trained, and the gradient of every layer's activations is wanted).
    """
    if first_backward is None:
        first_backward = next((layer for layer, count in enumerate(trained) if count), len(parameters))
    costs = []
    for layer, (whole, own) in enumerate(zip(parameters, trained, strict=True)):
        backward = whole * (1 + recompute) + own if layer >= first_backward else 0
        costs.append(whole + backward)
    return costs


def head_cost(head: int, trained: bool, target_share: float = 0.5, backward: bool = True) -> int:
    """Multiplications per token of the vocabulary product, rounded.

    Args:
        head: elements of the head's matrix.
        trained: the head itself is trained.
        target_share: target tokens over all tokens; the product is made for target tokens alone.
        backward: something is trained or wanted below, so that the gradient of the head's input is needed.
    """
    return round(head * (1 + backward + trained) * target_share)


def cut(costs: Sequence[int], head: int, stages: int) -> tuple[int, ...]:
    """The cut whose slowest stage costs least.

    Of several such cuts the most even one (least sum of squares); of equally even ones that whose stages begin
    earliest, because later stages keep the activations of fewer micro-batches. Exact, and the same on every rank.

    Args:
        costs: of every decoder layer.
        head: what the last stage does besides its layers.
        stages: number of stages; each gets at least one layer.

    Returns: first layer of every stage but the first.

    Raises:
        ValueError: fewer layers than stages.
    """
    layers = len(costs)
    if not 1 <= stages <= layers:
        raise ValueError(f"{layers} layers cannot be cut into {stages} stages of at least one layer")
    before = [0, *accumulate(costs)]

    def cost(first: int, end: int) -> int:
        return before[end] - before[first] + (head if end == layers else 0)

    # slowest[first]: the least that the slowest of the stages which share layers from `first` on can cost.
    slowest = {first: cost(first, layers) for first in range(layers)}
    for later in range(1, stages):
        slowest = {
            first: min(max(cost(first, end), slowest[end]) for end in range(first + 1, layers - later + 1))
            for first in range(layers - later)
        }
    limit = slowest[0]

    # evenest[first]: sum of squares and first layers of the best cut from `first` on that keeps to the limit.
    evenest: dict[int, tuple[int, tuple[int, ...]]] = {
        first: (cost(first, layers) ** 2, ()) for first in range(layers) if cost(first, layers) <= limit
    }
    for _ in range(stages - 1):
        found: dict[int, tuple[int, tuple[int, ...]]] = {}
        for first in range(layers):
            options = [
                (cost(first, end) ** 2 + squares, (end, *begins))
                for end, (squares, begins) in evenest.items()
                if end > first and cost(first, end) <= limit
            ]
            if options:
                found[first] = min(options)
        evenest = found
    return evenest[0][1]


def stage_costs(costs: Sequence[int], head: int, begins: Sequence[int]) -> list[int]:
    """What every stage costs.

    Args:
        costs: of every decoder layer.
        head: what the last stage does besides its layers.
        begins: first layer of every stage but the first.
    """
    stages = [sum(costs[first:end]) for first, end in pairwise([0, *begins, len(costs)])]
    stages[-1] += head
    return stages
