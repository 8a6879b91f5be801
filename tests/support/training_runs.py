"""The trainings that several tests look at: fixtures that start each world once and run all its jobs in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from support.worlds import Job, run_world

if TYPE_CHECKING:
    from support.tiny_run import TinyRun


def sets(**values: object) -> tuple[str, ...]:
    """`--set` arguments; a dot is written as two underscores."""
    return tuple(f"{key.replace('__', '.')}={value}" for key, value in values.items())


NOISY = sets(routing__alpha_max=1.0, routing__budget_weight=0.3, routing__budget=0.3)
SGD = (*NOISY, *sets(train__optimizer="sgd"), "train.lr={general: 1.0, specific: 2.0, gates: 2.0}")
ADAMW = (*NOISY, *sets(train__clip=0.2, train__weight_decay=0.05))
"""Every gradient norm is above 0.2, so clipping always bites."""

DETECT = "lander_ds.stages.detect:run"
GATHER = "support.jobs:train_and_gather"
FEW = (*NOISY, *sets(train__batch_tokens=96, train__steps=6))
"""One to three examples a step: fewer than four ranks have micro-batches."""
ABSENT = sets(
    routing__gate="none", train__batch_tokens=96, train__steps=12, train__clip=0.2, train__weight_decay=0.1
)
LORA = sets(train__method="lora", train__steps=6, train__lora__r=4)

PATIENCE = (
    *sets(train__valid_every=2, train__patience=1, train__save_every=3, train__log_every=2),
    "train.lr={general: 0.0, specific: 0.0, gates: 0.0}",
)
"""Nothing improves: the second validation, at step 4, ends it."""

JOBS: dict[int, tuple[Job, ...]] = {
    1: (
        Job("sgd", SGD),
        Job("sgd-micro4", (*SGD, "train.micro_batch=4")),
        Job("sgd-pack128", (*SGD, "train.micro_batch=2", "train.pack_tokens=128")),
        Job("adamw", ADAMW),
        Job("adamw-micro4", (*ADAMW, "train.micro_batch=4")),
        Job("adamw-pack128", (*ADAMW, "train.pack_tokens=128")),
        Job("few", FEW),
        Job("lora", LORA),
        Job("detect", (), DETECT),
        Job("detect-large", ("detect.batch_tokens=4096",), DETECT),
    ),
    2: (
        Job("sgd", (*SGD, "train.micro_batch=2", "train.valid_every=7")),
        Job("adamw", ADAMW),
        Job("none", ABSENT, GATHER),
        Job(
            "input",
            sets(routing__budget_weight=0.5, routing__budget=0.2, train__steps=8, train__clip=0.3),
            GATHER,
        ),
        Job(
            "output",
            (
                *sets(routing__gate="output", routing__gate_init="paper", routing__other_pairs="mask"),
                *sets(train__optimizer="sgd", train__steps=6, train__schedule="constant"),
                "train.banks=[specific]",
                "train.lr={specific: 1.0, gates: 1.0}",
            ),
            GATHER,
        ),
        Job("full", sets(train__method="full", train__steps=6, train__weight_decay=0.1)),
        Job("layers", sets(train__method="layers", train__steps=6, train__clip=0.2), GATHER),
        Job("lora", LORA, GATHER),
        Job("watched", ABSENT, "support.jobs:watch_groups"),
        Job("nudged", sets(train__steps=2), "support.jobs:train_and_nudge"),
        Job("patience", PATIENCE),
        Job("bfloat16", sets(model__dtype="bfloat16", train__steps=4)),
        Job("looked-into", sets(model__dtype="bfloat16"), "support.jobs:look_into_session"),
        Job("collectives", (), "support.jobs:use_collectives"),
        Job("detect", (), DETECT),
        # Last, because it ends in an error.
        Job(
            "diverged",
            (*sets(train__optimizer="sgd", train__save_every=1), "train.lr={general: 1.0e+30}"),
            "support.jobs:diverge",
        ),
    ),
    4: (
        Job("sgd", SGD),
        Job("adamw", ADAMW),
        Job("few", FEW),
        Job("detect", (), DETECT),
        Job("collectives", (), "support.jobs:use_collectives"),
    ),
}
"""By number of ranks."""


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A run in miniature, with prepared data and a selection."""
    from support.tiny_run import make_tiny_run

    return make_tiny_run(tmp_path_factory.mktemp("tiny"))


def _world(ranks: int) -> Callable[..., TinyRun]:
    @pytest.fixture(scope="session", name=f"world_{ranks}")
    def world(tiny_run: TinyRun) -> TinyRun:
        run_world(tiny_run.root, ranks, JOBS[ranks])
        return tiny_run

    return world


world_1, world_2, world_4 = map(_world, (1, 2, 4))
"""All jobs of that many ranks have run; their run directories are `<job>-<ranks>`."""
