"""`lander STAGE` and `lander all`."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

from lander_ds.common import launch
from lander_ds.common.lazy import load
from lander_ds.common.run_directory import RunDirectory
from lander_ds.distributed import accelerator, agreement, process_group, vectors
from lander_ds.distributed.start import Start
from lander_ds.preflight.facts import collect
from lander_ds.preflight.recipe import load_checked
from lander_ds.stages import catalogue
from lander_ds.stages.catalogue import ALL
from lander_ds.stages.stage import alone
from lander_ds.training import preemption

logger = logging.getLogger(__name__)


def run(arguments: argparse.Namespace) -> None:
    """Run the stages of a command on a recipe that is known to be sound, on ranks that are known to be alike."""
    preemption.leave_at_once()
    recipe = load_checked(arguments.recipe, arguments.overrides, arguments.stages)
    resumes = getattr(arguments, "auto_resume", False)
    start = Start(recipe, RunDirectory(recipe.run_dir), arguments.force, resumes)
    # A DeepSpeed JSON that cannot be used is refused here, before anything waits.
    logger.debug("%s: %s", recipe.deepspeed, start.deepspeed)
    if launch.rank() == 0 and catalogue.is_collective(arguments.stage):
        _advise(recipe.model.dtype)
    words = {"stage": arguments.stage, "force": start.force, "auto_resume": start.auto_resume}
    with process_group_for(start, arguments.stage, words):
        _run(start, arguments.stage, arguments.stages)


def _advise(dtype: str) -> None:
    if accelerator.is_cpu() and vectors.imitate(vectors.widest(), dtype):
        logger.warning(
            "model.dtype: this processor has no %s arithmetic and imitates it, several times slower than float32: set "
            "model.dtype=float32 where memory allows",
            dtype,
        )


@contextmanager
def process_group_for(start: Start, command: str, words: Mapping[str, object]) -> Iterator[None]:
    """Let the ranks meet, once they are known to be alike, in the group that a command needs, and part again.

    Args:
        start: this rank's.
        command: a stage or `all`.
        words: what this rank was told to do.
    """
    _open_process_group(start, command, words)
    try:
        yield
    except BaseException:
        # Leaving the group in good order would wait for ranks that wait for this one.
        if launch.world_size() == 1:
            process_group.stop()
        raise
    process_group.stop()


def _open_process_group(start: Start, command: str, words: Mapping[str, object]) -> None:
    """One process needs no group where it works alone."""
    ranks = launch.world_size()
    with agreement.alike(collect(start, {**words, "ranks": ranks}) if ranks > 1 else {}, ranks):
        if catalogue.is_collective(command):
            process_group.start(process_group.patience(start.recipe.train.stall_seconds))
        elif ranks > 1:
            process_group.start_on_cpu()


def _run(start: Start, command: str, stages: Sequence[str]) -> None:
    path = start.run.path
    # Two of them would take turns, a stage each.
    with alone(path / f".{ALL}.lock", f"all in {path}", collective=True) if command == ALL else nullcontext():
        for name in stages:
            # A stage brings its libraries with it; those of the others stay away.
            load(f"lander_ds.stages.{name}:STAGE").perform(start)
            accelerator.free_memory()
