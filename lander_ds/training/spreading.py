"""From a model on meta to an engine that runs it: the one way in which training and detection spread a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from lander_ds.config.recipe import Recipe
from lander_ds.config.schema.training import TrainConfig
from lander_ds.distributed.balance import span_of
from lander_ds.distributed.engines.engine import Engine
from lander_ds.distributed.engines.opening import open_engine
from lander_ds.distributed.parallel_dims import ParallelDims
from lander_ds.method.selection import Selection
from lander_ds.models.family import Family
from lander_ds.models.loading import fill
from lander_ds.models.parameter_groups import mark_trained
from lander_ds.models.preference import Preference
from lander_ds.models.quantization import quantizing
from lander_ds.models.span import Span, units
from lander_ds.models.translation_model import Objective, TranslationModel
from lander_ds.models.weights import BaseWeights
from lander_ds.training.optimizer import build_optimizer


def spread(
    recipe: Recipe,
    config: dict[str, Any],
    dims: ParallelDims,
    model: PreTrainedModel,
    family: Family,
    selection: Selection | None = None,
    trained: Mapping[str, torch.Tensor] | None = None,
    detect: bool = False,
) -> Engine:
    """Cut a model, fill this rank's span from disk, and put an engine around it (collective).

    Args:
        recipe: what is trained, and on which topology.
        config: resolved DeepSpeed configuration.
        dims: of this world.
        model: on meta, after surgery, trained parameters marked.
        family: its family.
        selection: what was trained parameters were marked by.
        trained: values that replace the base's, by parameter name.
        detect: nothing is trained, and gradients of activations go down to the embedding.
    """
    span = span_of(recipe, model, family, dims, everything=detect)
    engine = open_engine(recipe, config)
    weights = BaseWeights(recipe.model.path, recipe.model.allow_pickle)
    placement = engine.placement
    if recipe.model.quantize is not None:
        placement = quantizing(recipe.model.quantize, family.layers_of(model), placement)
    fill(model, family, weights, placement, trained, span, engine.reads_weights)
    part = TranslationModel(
        model,
        family,
        len(recipe.data.pairs),
        Objective(
            *(recipe.routing.budget_weight, recipe.routing.budget, recipe.seed),
            None if detect else preference_of(recipe.train),
        ),
        span,
        input_gradients=detect,
        recompute=recipe.train.activation_checkpointing and not detect,
    )
    optimizer = None if detect else _optimizer(recipe, config, model, family, selection, span)
    engine.attach(part, optimizer)
    return engine


def preference_of(train: TrainConfig) -> Preference | None:
    """What `train.objective` asks for besides likelihood."""
    return Preference(train.cpo.beta, train.cpo.likelihood) if train.objective == "cpo" else None


def _optimizer(
    recipe: Recipe,
    config: dict[str, Any],
    model: PreTrainedModel,
    family: Family,
    selection: Selection | None,
    span: Span,
) -> torch.optim.Optimizer | None:
    """The optimizer of what a filled span trains; None when that is nothing."""
    own = {id(parameter) for _, unit in units(model, family, span) for parameter in unit.parameters()}
    # Marked again: filling has put other parameter objects in place of those on meta.
    here = {
        name: [parameter for parameter in parameters if id(parameter) in own]
        for name, parameters in mark_trained(model, family, recipe.train, selection).items()
    }
    here = {name: parameters for name, parameters in here.items() if parameters}
    offload = "offload_optimizer" in config["zero_optimization"]
    return build_optimizer(here, recipe.train, offload) if here else None
