"""Which checkpoint is translated with or exported, and whether it was trained as the recipe says."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from lander_ds.checkpoint import checkpoint
from lander_ds.checkpoint.checkpoint import Checkpoint
from lander_ds.checkpoint.identity import changes, identity_of
from lander_ds.checkpoint.retention import best
from lander_ds.common.errors import ArtefactError
from lander_ds.common.files import file_hash
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.recipe import Recipe
from lander_ds.config.schema.method import RoutingConfig
from lander_ds.config.schema.training import TrainConfig

logger = logging.getLogger(__name__)


def chosen(directory: Path, choice: str, key: str = "translate.checkpoint") -> Checkpoint:
    """A whole checkpoint.

    Args:
        directory: `checkpoints/` of a run.
        choice: `last` (the newest that is whole), `best` (see `retention.best`) or `step-N`.
        key: the recipe key that holds the choice, for messages.

    Raises:
        ArtefactError: there is no such checkpoint, or it is damaged.
    """
    if choice == "last":
        return checkpoint.newest(directory)
    steps = checkpoint.steps(directory)
    if not steps:
        raise ArtefactError(f"no checkpoint in {directory}: run stage train first")
    wanted = best(directory, steps) if choice == "best" else {int(choice.removeprefix("step-"))} & set(steps)
    if wanted:
        return checkpoint.load(directory / f"step-{wanted.pop()}").verified()
    if choice == "best":
        raise ArtefactError(
            f"{key}: best: no checkpoint in {directory} was measured as train.keep_best says: train with "
            "train.valid_every and train.save_every, the latter a multiple of the former, or write last"
        )
    present = ", ".join(f"step-{step}" for step in steps)
    raise ArtefactError(f"{key}: {choice} is not in {directory}: there are {present}")


def description(directory: Path, choice: str) -> Mapping[str, Any] | None:
    """What state.json says of the checkpoint that `chosen` would give, without a look at the other files; None where it
    cannot be read.

    Args:
        directory: `checkpoints/` of a run.
        choice: as for `chosen`.
    """
    steps = checkpoint.steps(directory)
    match choice:
        case "last":
            wanted = steps[::-1]
        case "best":
            wanted = list(best(directory, steps))
        case _:
            wanted = [int(choice.removeprefix("step-"))]
    for step in wanted:
        with suppress(ArtefactError):
            return checkpoint.load(directory / f"step-{step}").state
    return None


def warn_of_changes(
    state: Mapping[str, Any], recipe: Recipe, run: RunDirectory, data_hash: str | None
) -> None:
    """Say what was trained otherwise than recipe, data and selection are now: what was trained counts.

    Args:
        state: of a checkpoint of the run.
        recipe: as it is now.
        run: where the selection lies.
        data_hash: of the prepared data; None where there are none.
    """
    # Another base is refused when the model is opened.
    inputs = {"base": state["base_fingerprint"], "data": data_hash or state["data_hash"]}
    if replay := state.get("replay_hash"):
        inputs["replay"] = replay
    if run.selection.exists():
        inputs["selection"] = file_hash(run.selection)
    for key, before, now in changes(state, identity_of(recipe, inputs)):
        logger.warning("step-%d was trained with %s=%s; now it is %s", state["step"], key, before, now)


def as_trained(recipe: Recipe, state: Mapping[str, Any]) -> Recipe:
    """The recipe with what a checkpoint was trained with: method, options of training and routing, pairs, seed.

    Args:
        recipe: as it is now.
        state: of the checkpoint.
    """
    train = {**state["train"], "method": state["method"], "lora": state["lora"]}
    return replace(
        recipe,
        seed=state["seed"],
        data=replace(recipe.data, pairs=tuple(state["pairs"])),
        routing=RoutingConfig(**state["routing"]),
        # From JSON, in which tuples are lists.
        train=TypeAdapter(TrainConfig).validate_json(json.dumps(train)),
    )
