"""What a checkpoint belongs to, and whether a training may go on from it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lander_ds.checkpoint import checkpoint, writer
from lander_ds.checkpoint.checkpoint import SELECTION, Checkpoint
from lander_ds.common.errors import ArtefactError
from lander_ds.common.nested import flatten
from lander_ds.config.recipe import Recipe
from lander_ds.config.schema.method import RoutingConfig
from lander_ds.config.schema.training import TrainConfig
from lander_ds.distributed import collectives, process_group

logger = logging.getLogger(__name__)

FIXED = (
    "method",
    "base_fingerprint",
    "data_hash",
    "replay_hash",
    "pairs",
    "dtype",
    "quantize",
    "selection_hash",
    "routing.gate",
    "routing.gate_init",
    "routing.hidden",
    "lora.r",
    "lora.alpha",
    "train.shira.r",
    "train.optimizer",
    "train.banks",
)
"""What must not change between a checkpoint and the training that goes on from it."""

FREE = (
    "train.steps",
    "train.micro_batch",
    "train.activation_checkpointing",
    "train.prefix_cache",
    "train.valid_every",
    "train.valid_examples",
    "train.patience",
    "train.save_every",
    "train.save_in_background",
    "train.keep_last",
    "train.keep_every",
    "train.keep_best",
    "train.max_skipped",
    "train.stall_seconds",
    "train.log_every",
    "train.trackers",
    "train.start_from",
)
"""What may change without a word: it changes neither batches nor updates (`steps` moves the end of the schedule)."""

CURES = {
    "base_fingerprint": "correct model.path",
    "data_hash": "run prepare with the corpora and options of then",
    "replay_hash": "run prepare with the texts of data.replay of then",
    "selection_hash": "bring back the selection of then",
}


def identity_of(recipe: Recipe, inputs: Mapping[str, str]) -> dict[str, Any]:
    """What the checkpoints of a training belong to, for state.json.

    Args:
        recipe: of the training.
        inputs: hashes of data, base, selection and replay.
    """
    train = asdict(recipe.train)
    return {
        "method": recipe.train.method,
        "base_fingerprint": inputs["base"],
        "data_hash": inputs["data"],
        "selection_hash": inputs.get("selection"),
        "replay_hash": inputs.get("replay"),
        "replay_share": recipe.data.replay.share or None,
        "pairs": list(recipe.data.pairs),
        "dtype": recipe.model.dtype,
        "quantize": recipe.model.quantize,
        "seed": recipe.seed,
        "routing": asdict(recipe.routing),
        "lora": train.pop("lora"),
        "train": _plain(train),
    }


def starting_point(
    directory: Path,
    identity: Mapping[str, Any],
    force: bool,
    auto_resume: bool,
    is_base: Callable[[object], bool] = lambda recorded: False,
) -> Checkpoint | None:
    """The checkpoint to go on from, or None to start anew (collective). `force` deletes checkpoints.

    Args:
        directory: of the checkpoints.
        identity: what the training belongs to.
        force: delete checkpoints and start anew.
        auto_resume: go on from the newest whole one.
        is_base: whether a fingerprint in another form than the identity's is that of the base.

    Raises:
        ArtefactError: it is not said what to do with the checkpoints there are, or the newest belongs to something
            else.
    """
    newest: Checkpoint | None = None
    refusal: str | None = None
    if process_group.rank() == 0:
        try:
            newest = _decide(directory, identity, force, auto_resume, is_base)
        except ArtefactError as error:
            refusal = str(error)
    refusal = collectives.from_rank_zero(refusal)
    if refusal is not None:
        raise ArtefactError(refusal)
    step = collectives.from_rank_zero(None if newest is None else newest.step)
    if step is None:
        return None
    # Rank 0 has compared the hashes; the others read the same files.
    return newest or replace(checkpoint.load(directory / f"step-{step}"), checked=True)


def _decide(
    directory: Path,
    identity: Mapping[str, Any],
    force: bool,
    auto_resume: bool,
    is_base: Callable[[object], bool],
) -> Checkpoint | None:
    present = checkpoint.steps(directory)
    if not present:
        return None
    if force:
        writer.remove_all(directory)
        return None
    if not auto_resume:
        raise ArtefactError(
            f"{directory} holds checkpoints of an unfinished or different training (newest: step {present[-1]}): "
            "--auto-resume goes on from there, --force deletes them and starts anew, another run_dir keeps them"
        )
    newest = checkpoint.newest(directory)
    _compare(newest, identity, is_base)
    logger.info("going on from %s", newest.path)
    return newest


def _compare(saved: Checkpoint, identity: Mapping[str, Any], is_base: Callable[[object], bool]) -> None:
    """Refuse a checkpoint of another training; say what else has changed."""
    for key, before, now in changes(saved.state, identity):
        if key == "base_fingerprint" and is_base(before):
            continue
        change = f"{key} was {before}, now it is {now}"
        if key in FIXED or (key == "seed" and saved.state["method"] == "shira"):
            # The checkpoint holds SHiRA's entries; where they stand follows from the seed.
            cure = CURES.get(key, "change it back")
            raise ArtefactError(
                f"{saved.path} is of another training: {change}: {cure}, or start anew in another run_dir (or with "
                "--force, which deletes the checkpoints)"
            )
        logger.warning("going on with another option than before: %s", change)


def changes(state: Mapping[str, Any], identity: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """What a checkpoint was trained with otherwise than `identity` says: key, value of then, value of now."""
    now = flatten(_plain(identity))
    before = {key: value for key, value in _defaults().items() if key in now}
    before |= flatten(_plain({key: state.get(key) for key in identity}))
    if SELECTION not in state["files"]:
        before.pop("selection_hash", None)
        now.pop("selection_hash", None)
    for key in sorted((before.keys() | now.keys()) - set(FREE)):
        if before.get(key) != now.get(key):
            yield key, before.get(key), now.get(key)


def _defaults() -> dict[str, Any]:
    """What options were before they existed, for checkpoints that do not name them."""
    return flatten(_plain({"train": asdict(TrainConfig()), "routing": asdict(RoutingConfig())}))


def _plain(value: Any) -> Any:
    """As JSON gives it back: tuples are lists."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
