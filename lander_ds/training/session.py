"""Everything a training needs, put together: model, selection, engine, data plan."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from lander_ds.checkpoint.checkpoint import Checkpoint
from lander_ds.common.errors import ArtefactError
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.recipe import Recipe
from lander_ds.data.batching.micro_batches import micro_batch_tokens, micro_batches_for
from lander_ds.distributed.engines.engine import Engine
from lander_ds.distributed.parallel_dims import ParallelDims, layout, open_engine, reads_weights, span_of
from lander_ds.distributed.start import Start
from lander_ds.method.selection import Selection
from lander_ds.models.family import Family
from lander_ds.models.loading import Placement, build, fill, tied_parameters
from lander_ds.models.parameter_groups import mark_trained, prepare_model
from lander_ds.models.routed_ffn import RoutingState
from lander_ds.models.span import units
from lander_ds.models.translation_model import Objective, TranslationModel
from lander_ds.models.weights import BaseWeights
from lander_ds.training.optimizer import build_optimizer

logger = logging.getLogger(__name__)

METHODS_WITH_SELECTION = ("lander", "layers")


@dataclass(frozen=True)
class Session:
    """A model ready to be trained."""

    recipe: Recipe
    engine: Engine
    """Around this rank's `TranslationModel`."""
    grid: ParallelDims
    """Which rank does what."""
    family: Family
    state: RoutingState | None
    group_sizes: dict[str, int]
    """Trained parameters per group, over all ranks."""
    total_parameters: int
    """Parameters of the model, trained and frozen, tied ones once."""
    micro_batches: int
    """Micro-batches per data-parallel rank and step."""
    fingerprint: str
    """Of the base model."""

    @property
    def model(self) -> TranslationModel:
        """This rank's span of the model."""
        return self.engine.model

    @property
    def trained_parameters(self) -> int:
        """Parameters that the optimizer updates."""
        return sum(self.group_sizes.values())


def micro_batches(recipe: Recipe, ranks: int) -> int:
    """Micro-batches per data-parallel rank in one step: enough for the token budget of a global batch."""
    return micro_batches_for(recipe.train.batch_tokens, micro_batch_tokens(recipe.train), ranks)


def load_selection(recipe: Recipe, run: RunDirectory, fingerprint: str) -> Selection | None:
    """The run's selection, or None for methods without one.

    Raises:
        ArtefactError: it is missing or was made for other pairs or another base.
    """
    if recipe.train.method not in METHODS_WITH_SELECTION:
        return None
    selection = Selection.load(run.selection)
    if selection.pairs != recipe.data.pairs:
        raise ArtefactError(
            f"{run.selection} is for pairs {', '.join(selection.pairs)}, the recipe's data.pairs are "
            f"{', '.join(recipe.data.pairs)}: run stages detect and select again"
        )
    made_for = selection.metadata.get("base_fingerprint")
    if made_for != fingerprint:
        raise ArtefactError(
            f"{run.selection} was made for another base model ({made_for}) than {recipe.model.path} "
            f"({fingerprint}): run stages detect and select again"
        )
    return selection


def open_session(start: Start, found: Checkpoint | None = None) -> Session:
    """Build, fill and spread the model and make the engine (collective).

    Args:
        start: what to train, and the run directory in which the selection lies.
        found: checkpoint to go on from; its selection is that of the run.
    """
    recipe, run = start.recipe, start.run
    grid = layout(recipe)
    selection = load_selection(recipe, run, start.base_fingerprint)
    per_rank = micro_batches(recipe, grid.data_ranks)
    config = start.deepspeed_config(grid.data_ranks, per_rank)
    config.setdefault(
        "tensorboard", {"enabled": True, "output_path": str(run.path), "job_name": "tensorboard"}
    )
    model, family = build(recipe.model)
    state = prepare_model(model, family, recipe, selection)
    # Parameters are still whole here, on meta.
    groups = mark_trained(model, family, recipe.train, selection)
    tied = tied_parameters(model)
    # What is tied to another parameter is another object here, but counts once.
    doubles = {id(parameter) for name, parameter in model.named_parameters() if name in tied}
    sizes = {
        name: sum(p.numel() for p in parameters if id(p) not in doubles)
        for name, parameters in groups.items()
    }
    total = sum(parameter.numel() for name, parameter in model.named_parameters() if name not in tied)
    span = span_of(recipe, model, family, grid)

    def make_model(place: Placement) -> TranslationModel:
        trained = {} if found is None else found.trained()
        weights = BaseWeights(recipe.model.path, recipe.model.allow_pickle)
        fill(model, family, weights, place, trained, span, reads_weights(recipe, grid))
        return TranslationModel(
            model,
            family,
            len(recipe.data.pairs),
            state,
            Objective(recipe.routing.budget_weight, recipe.routing.budget, recipe.seed),
            span,
            recompute=recipe.train.activation_checkpointing,
        )

    def make_optimizer() -> torch.optim.Optimizer | None:
        own = {id(parameter) for _, unit in units(model, family, span) for parameter in unit.parameters()}
        here = {
            name: [parameter for parameter in parameters if id(parameter) in own]
            for name, parameters in mark_trained(model, family, recipe.train, selection).items()
        }
        here = {name: parameters for name, parameters in here.items() if parameters}
        offload = "offload_optimizer" in config["zero_optimization"]
        return build_optimizer(here, recipe.train, offload) if here else None

    engine = open_engine(recipe, config, make_model, make_optimizer)
    if found is not None:
        engine.restore(found.trained(), found.optimizer(), found.state["group_steps"])
    return Session(recipe, engine, grid, family, state, sizes, total, per_rank, start.base_fingerprint)
