"""What the ranks of benchmarks/resume.py run; imported in them."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace

from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.recipe import Recipe
from lander_ds.data.prepared import PreparedData
from lander_ds.distributed import collectives, process_group
from lander_ds.distributed.start import Start
from lander_ds.stages import train
from lander_ds.training.metrics_logger import MetricsLogger
from lander_ds.training.progress import Progress
from lander_ds.training.saver import Saver
from lander_ds.training.session import open_session
from lander_ds.training.trainer import Trainer

BLOCK = 10
"""Steps between saves."""
KINDS = ("none", "background", "foreground")
COPY = "copy"
"""The part of a block with a save in the background that passes before its first step."""
TIMES = "save-seconds.json"


def go_on(recipe: Recipe, run: RunDirectory) -> None:
    """Stage train with --auto-resume."""
    train.run(recipe, run, auto_resume=True)


def time_saves(recipe: Recipe, run: RunDirectory) -> None:
    """Blocks of ten steps that begin with a save in the background, with one in the foreground, and without one, in
    turn, in one session. `train.valid_every` is the number of rounds.

    A block in the background ends when its checkpoint is there: what does not fit behind ten steps counts.
    """
    session, data = open_session(Start(recipe, run)), PreparedData.load(run, recipe)
    trainer = Trainer(session, data, MetricsLogger(run.metrics, None, 1), lambda progress, loss: None)
    savers = {}
    for kind in KINDS[1:]:
        own = RunDirectory(run.path / kind)
        if process_group.rank() == 0:
            own.path.mkdir()
            shutil.copy(run.selection, own.selection)
        options = replace(recipe.train, save_in_background=kind == "background", keep_last=1)
        savers[kind] = Saver(replace(session, recipe=replace(recipe, train=options)), own, {})
    times: dict[str, list[float]] = {kind: [] for kind in (*KINDS, COPY)}
    step = 0
    for number in range(-1, recipe.train.valid_every):
        shift = number % len(KINDS)
        for kind in KINDS[shift:] + KINDS[:shift]:
            collectives.barrier()
            began = time.perf_counter()
            if kind in savers:
                savers[kind](Progress(done=step), None)
            copied = time.perf_counter()
            for _ in range(BLOCK):
                trainer._step(step, False)
                step += 1
            if kind in savers:
                savers[kind].finish()
            collectives.barrier()
            # The first round warms up.
            if number >= 0:
                times[kind].append(time.perf_counter() - began)
                if kind == "background":
                    times[COPY].append(copied - began)
    if process_group.rank() == 0:
        (run.path / TIMES).write_text(json.dumps(times))
    session.engine.destroy()
