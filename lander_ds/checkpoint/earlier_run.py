"""`train.start_from`: what another training left, as the beginning of a new one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lander_ds.checkpoint import checkpoint
from lander_ds.checkpoint.checkpoint import Checkpoint
from lander_ds.checkpoint.identity import changes
from lander_ds.common.errors import ArtefactError
from lander_ds.common.run_directory import RunDirectory

KEY = "train.start_from"
SAME = ("method", "base_fingerprint", "pairs", "selection_hash")
SAME_OF_METHOD = {
    "lander": ("routing.gate", "routing.gate_init", "routing.hidden", "train.banks"),
    "lora": ("lora.r", "lora.alpha"),
    "shira": ("train.shira.r", "seed"),
}
"""What decides which tensors are trained, and what they mean. (The seed draws SHiRA's entries.)"""
CURES = {
    "base_fingerprint": "correct model.path",
    "selection_hash": "run stage select again, which takes over the selection of then",
}


@cache
def earlier_checkpoint(directory: str) -> Checkpoint:
    """The newest whole checkpoint of a run directory, or the checkpoint at a path. Its files are read for that, so a process
    looks once.

    Raises:
        ArtefactError: there is none, or it is damaged.
    """
    path, checkpoints = Path(directory), RunDirectory(directory).checkpoints
    if checkpoints.is_dir():
        return checkpoint.newest(checkpoints)
    if not path.is_dir():
        raise ArtefactError(
            f"{KEY}: {directory} does not exist: name a run directory, or one of its checkpoints"
        )
    return checkpoint.load(path).verified()


def check_fit(
    saved: Checkpoint, identity: Mapping[str, Any], is_base: Callable[[object], bool] = lambda recorded: False
) -> None:
    """Refuse what trained something else.

    Args:
        saved: where the training starts.
        identity: of the training that starts; keys that are not known yet may be missing.
        is_base: whether a fingerprint in another form than the identity's is that of the base.

    Raises:
        ArtefactError: naming what differs.
    """
    different = {key: (before, now) for key, before, now in changes(saved.state, identity)}
    for key in (*SAME, *SAME_OF_METHOD.get(saved.state["method"], ())):
        if key not in different:
            continue
        before, now = different[key]
        if key == "base_fingerprint" and is_base(before):
            continue
        cure = CURES.get(key, "make both the same, or leave train.start_from out")
        raise ArtefactError(f"{KEY}: {saved.path} was trained with {key} {before}, now it is {now}: {cure}")
