"""Where to cut a model into pipeline stages so that the slowest one is as fast as possible (I).

DeepSpeed's `partition_method: parameters` counts trained parameters alone, which says little of a mostly frozen
model. Here a cost is the matrix elements that a token is multiplied by (two FLOPs each): every layer once forward;
from the lowest trained layer upwards once more for the gradient of its input; trained elements once more for their own
gradient; with recomputation the layers that have a backward pass once more forward. The head is the same on the
target tokens. Left out: the part of attention that grows with the length of examples, which is the same in every layer
of most models; norms; the embedding, which is a lookup.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import accumulate, pairwise

from torch import nn
from transformers import PreTrainedModel

from lander_ds.config.recipe import Recipe
from lander_ds.distributed.parallel_dims import ParallelDims
from lander_ds.models.family import Family
from lander_ds.models.span import Span, spans
from lander_ds.models.surgery import gradient_elements, used_shares

logger = logging.getLogger(__name__)


def span_of(
    recipe: Recipe, model: PreTrainedModel, family: Family, dims: ParallelDims, everything: bool = False
) -> Span:
    """The part of the model that this rank's pipeline stage computes: as `pipeline_cut` says, or balanced by compute.

    Args:
        recipe: topology and cut.
        model: after surgery, trained parameters marked; may be on meta.
        family: its family.
        dims: of this world.
        everything: gradients go down to the embedding although nothing is trained (detection).
    """
    layers = family.layers_of(model)
    if dims.pipeline_stages == 1:
        return Span(0, len(layers), len(layers))
    costs, of_head = costs_of(
        layers, model.get_output_embeddings().weight, recipe.train.activation_checkpointing, everything
    )
    begins = recipe.pipeline_cut or cut(costs, of_head, dims.pipeline_stages)
    all_spans = spans(begins, len(layers))
    shares = pipeline_stage_costs(costs, of_head, begins)
    for number, (span, share) in enumerate(zip(all_spans, shares, strict=True)):
        logger.info(
            "pipeline stage %d: decoder layers %d to %d, %.0f %% of the compute of the slowest stage",
            number,
            span.start,
            span.stop - 1,
            100.0 * share / max(shares),
        )
    return all_spans[dims.pipeline_stage]


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
    shares = used_shares(layers)

    def used(parameter: nn.Parameter, elements: int) -> int:
        return round(elements * shares.get(id(parameter), 1.0))

    costs = layer_costs(
        [sum(used(p, p.numel()) for p in layer.parameters() if p.dim() > 1) for layer in layers],
        [
            sum(used(p, gradient_elements(p)) for p in layer.parameters() if p.requires_grad)
            for layer in layers
        ],
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


def cut(costs: Sequence[int], head: int, pipeline_stages: int) -> tuple[int, ...]:
    """The cut whose slowest pipeline stage costs least.

    Of several such cuts the most even one (least sum of squares); of equally even ones that whose pipeline stages begin
    earliest, because later ones keep the activations of fewer micro-batches. Exact, and the same on every rank.

    Args:
        costs: of every decoder layer.
        head: what the last pipeline stage does besides its layers.
        pipeline_stages: how many; each gets at least one layer.

    Returns: first layer of every pipeline stage but the first.

    Raises:
        ValueError: fewer layers than pipeline stages.
    """
    layers = len(costs)
    if not 1 <= pipeline_stages <= layers:
        raise ValueError(f"{layers} layers cannot be cut into {pipeline_stages} stages of at least one layer")
    before = [0, *accumulate(costs)]

    def cost(first: int, end: int) -> int:
        return before[end] - before[first] + (head if end == layers else 0)

    # slowest[first]: the least that the slowest of the stages which share layers from `first` on can cost.
    slowest = {first: cost(first, layers) for first in range(layers)}
    for later in range(1, pipeline_stages):
        slowest = {
            first: min(max(cost(first, end), slowest[end]) for end in range(first + 1, layers - later + 1))
            for first in range(layers - later)
        }
    limit = slowest[0]

    # evenest[first]: sum of squares and first layers of the best cut from `first` on that keeps to the limit.
    evenest: dict[int, tuple[int, tuple[int, ...]]] = {
        first: (cost(first, layers) ** 2, ()) for first in range(layers) if cost(first, layers) <= limit
    }
    for _ in range(pipeline_stages - 1):
        one_more: dict[int, tuple[int, tuple[int, ...]]] = {}
        for first in range(layers):
            options = [
                (cost(first, end) ** 2 + squares, (end, *begins))
                for end, (squares, begins) in evenest.items()
                if end > first and cost(first, end) <= limit
            ]
            if options:
                one_more[first] = min(options)
        evenest = one_more
    return evenest[0][1]


def pipeline_stage_costs(costs: Sequence[int], head: int, begins: Sequence[int]) -> list[int]:
    """What every pipeline stage costs.

    Args:
        costs: of every decoder layer.
        head: what the last pipeline stage does besides its layers.
        begins: first layer of every pipeline stage but the first.
    """
    sums = [sum(costs[first:end]) for first, end in pairwise([0, *begins, len(costs)])]
    sums[-1] += head
    return sums
