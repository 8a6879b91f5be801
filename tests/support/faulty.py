"""Trainings to which something happens; imported in the ranks of a test world."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable

from lander_ds.common.errors import LanderError
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.recipe import Recipe
from lander_ds.distributed import collectives, process_group
from lander_ds.stages import train
from lander_ds.training.preemption import Preempted
from lander_ds.training.saver import Saver
from lander_ds.training.trainer import Trainer

NOTES = "notes.json"
SIGNAL_AT, SKIPPED = 3, (2, 4)
"""Steps, from 1."""

Step = Callable[[Trainer, int, bool], object]


def _with_step(replacement: Callable[[Step], Step], work: Callable[[], None]) -> None:
    """Do `work` with another `Trainer._step`."""
    step = Trainer._step
    Trainer._step = replacement(step)  # type: ignore[method-assign, assignment]
    try:
        work()
    finally:
        Trainer._step = step  # type: ignore[method-assign]


def preempted_and_resumed(recipe: Recipe, run: RunDirectory) -> None:
    """Rank 1 alone gets a signal during a step; then the same training is started again."""

    def signalling(step: Step) -> Step:
        def wrapped(loop: Trainer, number: int, stop: bool) -> object:
            if process_group.rank() == 1 and number + 1 == SIGNAL_AT:
                os.kill(os.getpid(), signal.SIGUSR1)
            return step(loop, number, stop)

        return wrapped

    def work() -> None:
        try:
            train.run(recipe, run)
        except Preempted as error:
            (run.path / f"{process_group.rank()}-{NOTES}").write_text(
                json.dumps([error.exit_code, str(error)])
            )

    _with_step(signalling, work)
    collectives.barrier()
    if process_group.rank() == 0:
        shutil.copytree(run.checkpoints, run.path / "after-the-signal")
        assert not run.record_path("train").exists()
    collectives.barrier()
    train.run(recipe, run, auto_resume=True)


def signalled_again(recipe: Recipe, run: RunDirectory) -> None:
    """Another signal comes when training has ended and the last checkpoint may not be written yet."""
    finish = Saver.finish

    def interrupted(saver: Saver) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        finish(saver)

    Saver.finish = interrupted  # type: ignore[assignment, method-assign]
    train.run(recipe, run)


def refused(recipe: Recipe, run: RunDirectory) -> None:
    """Start a finished training again: with more steps, without saying what to do with its checkpoints; with fewer."""
    train.run(recipe, run)
    wording = []
    for steps, resume in ((9, False), (1, True)):
        other = Recipe(
            **{**vars(recipe), "train": type(recipe.train)(**{**vars(recipe.train), "steps": steps})}
        )
        try:
            train.run(other, run, auto_resume=resume)
        except LanderError as error:
            wording.append([error.exit_code, str(error)])
    (run.path / f"{process_group.rank()}-{NOTES}").write_text(json.dumps(wording))


def infinite_gradients(recipe: Recipe, run: RunDirectory) -> None:
    """On rank 1 the gradients of some steps hold infinities; weights before and after every step are compared."""
    now, hooked, unchanged = [0], [False], []

    def spoiling(step: Step) -> Step:
        def wrapped(loop: Trainer, number: int, stop: bool) -> object:
            now[0] = number + 1
            if not hooked[0]:
                hooked[0] = True
                for parameter in loop.session.model.parameters():
                    if parameter.requires_grad and process_group.rank() == 1:
                        parameter.register_hook(lambda g: g * math.inf if now[0] in SKIPPED else g)
            before = _state(loop)
            record = step(loop, number, stop)
            unchanged.append(all(map(_equal, before, _state(loop))))
            return record

        return wrapped

    _with_step(spoiling, lambda: train.run(recipe, run))
    (run.path / f"{process_group.rank()}-{NOTES}").write_text(json.dumps(unchanged))


def _state(loop: Trainer) -> list[object]:
    engine = loop.session.engine
    optimizer = engine._optimizer
    assert optimizer is not None
    actual: list[object] = [dict(sorted(engine.group_steps().items()))]
    for _, part in engine._masters():
        actual += [
            part.detach().clone(),
            *(v.clone() for v in optimizer.state[part].values() if hasattr(v, "clone")),
        ]
    return actual


def _equal(one: object, other: object) -> bool:
    return bool((one == other).all()) if hasattr(one, "shape") else one == other  # type: ignore[attr-defined]
