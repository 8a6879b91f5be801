"""Everything a training needs, put together: model, selection, engine, data plan."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from lander_ds.config.deepspeed_json import resolve_deepspeed_config
from lander_ds.config.recipe import Recipe
from lander_ds.errors import ArtefactError
from lander_ds.families.family import Family
from lander_ds.families.loading import build, fill
from lander_ds.families.weights import BaseWeights, base_fingerprint
from lander_ds.parallel import comm, zero3
from lander_ds.routing.routed_ffn import RoutingState
from lander_ds.run import RunDirectory
from lander_ds.selection.selection import Selection
from lander_ds.training.batches import micro_batch_tokens, micro_batches_for
from lander_ds.training.groups import mark_trained, prepare_model
from lander_ds.training.model import TranslationModel
from lander_ds.training.optimizer import build_optimizer

logger = logging.getLogger(__name__)

METHODS_WITH_SELECTION = ("lander", "layers")


@dataclass(frozen=True)
class Session:
    """A model ready to be trained."""

    recipe: Recipe
    engine: Any
    """The DeepSpeed engine around a `TranslationModel`."""
    family: Family
    state: RoutingState | None
    group_sizes: dict[str, int]
    """Trained parameters per group."""
    total_parameters: int
    """Parameters of the model, trained and frozen, tied ones once."""
    micro_batches: int
    """Micro-batches per rank and step."""
    fingerprint: str
    """Of the base model."""

    @property
    def model(self) -> TranslationModel:
        """What the engine wraps."""
        return self.engine.module  # type: ignore[no-any-return]

    @property
    def trained_parameters(self) -> int:
        """Parameters that the optimizer updates."""
        return sum(self.group_sizes.values())


def micro_batches(recipe: Recipe, ranks: int) -> int:
    """Micro-batches per rank in one step: enough for the token budget of a global batch."""
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


def open_session(recipe: Recipe, run: RunDirectory) -> Session:
    """Build, fill and shard the model and make the engine (collective)."""
    fingerprint = base_fingerprint(recipe.model.path)
    selection = load_selection(recipe, run, fingerprint)
    per_rank = micro_batches(recipe, comm.world_size())
    config = resolve_deepspeed_config(recipe, world_size=comm.world_size(), micro_batches=per_rank)
    config.setdefault(
        "tensorboard", {"enabled": True, "output_path": str(run.path), "job_name": "tensorboard"}
    )
    model, family = build(recipe.model)
    state = prepare_model(model, family, recipe, selection)
    mark_trained(model, family, recipe.train, selection)
    fill(model, family, BaseWeights(recipe.model.path), zero3.partitioner(config))
    groups = mark_trained(model, family, recipe.train, selection)
    wrapped = TranslationModel(
        model,
        family,
        len(recipe.data.pairs),
        state,
        budget_weight=recipe.routing.budget_weight,
        budget=recipe.routing.budget,
        seed=recipe.seed,
    )
    sizes = {name: sum(zero3.numel(p) for p in parameters) for name, parameters in groups.items()}
    total = sum(zero3.numel(p) for p in model.parameters())
    offload = "offload_optimizer" in config["zero_optimization"]
    optimizer = build_optimizer(groups, recipe.train, offload)
    engine = zero3.initialise(wrapped, config, optimizer)
    zero3.allocate_optimizer_state(engine)
    return Session(recipe, engine, family, state, sizes, total, per_rank, fingerprint)
