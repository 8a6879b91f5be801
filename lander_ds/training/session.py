"""Everything a training needs, put together: model, selection, engine, data plan."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lander_ds.checkpoint.checkpoint import Checkpoint
from lander_ds.common.errors import ArtefactError
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.recipe import Recipe
from lander_ds.data.batching.micro_batches import micro_batch_tokens, micro_batches_for
from lander_ds.distributed.engines.engine import Engine
from lander_ds.distributed.parallel_dims import ParallelDims, parallel_dims
from lander_ds.distributed.start import Start
from lander_ds.method.selection import Selection
from lander_ds.models.family import Family
from lander_ds.models.loading import build, tied_parameters
from lander_ds.models.parameter_groups import mark_trained, prepare_model
from lander_ds.models.translation_model import TranslationModel
from lander_ds.models.weights import is_base
from lander_ds.training.spreading import spread

logger = logging.getLogger(__name__)

METHODS_WITH_SELECTION = ("lander", "layers")


@dataclass(frozen=True)
class Session:
    """A model ready to be trained."""

    recipe: Recipe
    engine: Engine
    """Around this rank's `TranslationModel`."""
    dims: ParallelDims
    """Which rank does what."""
    family: Family
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
    def routed(self) -> bool:
        """Whether the model has routed FFNs."""
        return bool(self.model.routed_layers)

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
    base = selection.metadata.get("base_fingerprint")
    if not is_base(base, fingerprint, recipe.model.path):
        raise ArtefactError(
            f"{run.selection} was made for another base model ({base}) than {recipe.model.path} "
            f"({fingerprint}): run stages detect and select again"
        )
    return selection


def open_session(
    start: Start, resumed: Checkpoint | None = None, earlier: Checkpoint | None = None
) -> Session:
    """Build, fill and spread the model and make the engine (collective).

    Args:
        start: what to train, and the run directory in which the selection lies.
        resumed: checkpoint to go on from; its selection is that of the run.
        earlier: without `resumed`, checkpoint of another run with the same selection, whose result is trained further.
    """
    recipe, run = start.recipe, start.run
    dims = parallel_dims(recipe)
    selection = load_selection(recipe, run, start.base_fingerprint)
    per_rank = micro_batches(recipe, dims.data_parallel_ranks)
    config = start.deepspeed_config(dims.data_parallel_ranks, per_rank)
    if "tensorboard" in recipe.train.trackers:
        config.setdefault(
            "tensorboard", {"enabled": True, "output_path": str(run.path), "job_name": "tensorboard"}
        )
    model, family = build(recipe.model)
    prepare_model(model, family, recipe, selection)
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
    trained: Mapping[str, torch.Tensor] = {}
    if resumed is not None:
        trained = resumed.trained()
    elif earlier is not None:
        trained = earlier.result()
    engine = spread(recipe, config, dims, model, family, selection, trained)
    if resumed is not None:
        engine.restore(trained, resumed.optimizer(), resumed.state["group_steps"], resumed.averaged())
    elif earlier is not None:
        # Whole masters: the weights were filled in the type of the model.
        engine.restore(trained, {}, dict.fromkeys(groups, 0), {})
    return Session(recipe, engine, dims, family, sizes, total, per_rank, start.base_fingerprint)
