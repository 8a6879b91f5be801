"""The trainings that several tests look at: fixtures that start each world once and run all its jobs in it."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

from support.worlds import Job, run_world

if TYPE_CHECKING:
    from support.tiny_run import TinyRun


def sets(**values: object) -> tuple[str, ...]:
    """`--set` arguments; a dot is written as two underscores."""
    return tuple(f"{key.replace('__', '.')}={value}" for key, value in values.items())


ROOMY = ("train.pack_tokens=192",)
"""Half as many micro-batches, and so half the work, for the same result: see `sgd-micro4` and `sgd-pack128`. Not for what
is about several micro-batches on each of several ranks: sgd, adamw, cached."""

NOISY = sets(routing__alpha_max=1.0, routing__budget_weight=0.3, routing__budget=0.3)
SGD = (*NOISY, *sets(train__optimizer="sgd"), "train.lr={general: 1.0, specific: 2.0, gates: 2.0}")
ADAMW = (*NOISY, *sets(train__clip=0.2, train__weight_decay=0.05))
"""Every gradient norm is above 0.2, so clipping always bites."""

DETECT = "lander_ds.stages.detect:run"
GATHER = "support.jobs:train_and_gather"
DIVERGE = "support.jobs:diverge"
EVERY_STAGE = "support.jobs:every_stage"
LOOK = "support.jobs:look_into_session"
NUDGE = "support.jobs:train_and_nudge"
FURTHER = "support.jobs:select_and_train"
PREPARE_AND_TRAIN = "support.jobs:prepare_and_train"
TRAIN_LOWER = "support.jobs:train_lower"
COLLECTIVES = "support.jobs:use_collectives"
RELAY = "support.jobs:relay"
WATCH = "support.jobs:train_and_watch"
CACHED = (*ADAMW, *sets(train__prefix_cache="disk"))
FEW = (*NOISY, *sets(train__batch_tokens=96, train__steps=6))
"""One to three examples a step: fewer than four ranks have micro-batches."""
ABSENT = sets(
    routing__gate="none", train__batch_tokens=96, train__steps=8, train__clip=0.2, train__weight_decay=0.1
)
LORA = (*ROOMY, *sets(train__method="lora", train__steps=4, train__lora__r=4))
SHIRA = (*ROOMY, *sets(train__method="shira", train__steps=4, train__shira__r=3, train__lr__shira=3e-3))
LAYERS = (*ROOMY, *sets(train__method="layers", train__steps=3, train__clip=0.2))
OUTPUT = (
    *ROOMY,
    *sets(routing__gate="output", routing__gate_init="paper", routing__other_pairs="mask"),
    *sets(train__optimizer="sgd", train__steps=3, train__schedule="constant"),
    "train.banks=[specific]",
    "train.lr={specific: 1.0, gates: 1.0}",
)
FULL = (*ROOMY, *sets(train__method="full", train__steps=3, train__clip=0.5), "model.path=$root/untied")
LOWER = (*NOISY, *ROOMY, *sets(train__steps=3, train__clip=0.2))
AVERAGED = (*ADAMW, *ROOMY, *sets(train__steps=4, train__save_every=1, train__average__last=3))
REPLAY = (
    *ADAMW,
    *ROOMY,
    *sets(train__steps=3),
    "data.replay={share: 0.4, corpora: [{path: $root/general.txt}]}",
)
CPO = (
    *REPLAY,
    *sets(train__objective="cpo", train__cpo__beta=0.3, train__cpo__likelihood=0.7),
    "data.corpora=[{path: '$root/preferred.train.{pair}.jsonl', columns: {rejected: worse}}, "
    "{path: '$root/preferred.valid.{pair}.jsonl', split: valid, columns: {rejected: worse}}, "
    "{path: '$root/test.{pair}.jsonl', split: test}]",
)
"""Preferences, and texts without one."""
STAYS = (
    *sets(train__steps=1, train__start_from="$root/adamw-1"),
    "train.lr={general: 1.0e-9, specific: 1.0e-9, gates: 1.0e-9}",
)
"""Where another run has come to."""
STAYS_ROUNDED = (*STAYS, "model.dtype=bfloat16", "train.start_from=$root/bfloat16-1")
"""The same where weights are rounded in the model, but not in the optimizer."""
BFLOAT16 = (*ROOMY, *sets(model__dtype="bfloat16", train__steps=3))
WHOLE = (
    *ROOMY,
    *sets(train__steps=3, translate__max_new_tokens=8, score__bootstrap_samples=20),
    "translate.systems=[base, trained]",
    "export.formats=[dense]",
    "select.layers.k=2",
)
NF4 = (*WHOLE, "model.quantize=nf4")
EXPERTS = (*NOISY, *WHOLE, "model.path=$root/experts")
INT8_LORA = (*LORA, "model.quantize=int8")
ONE_REPLICATED = ("topology=replicated", "deepspeed=$root/replicated.json")
HAS_BITSANDBYTES = find_spec("bitsandbytes") is not None
RELAYED = (*ADAMW, *ROOMY, *sets(train__steps=8, train__schedule="constant", routing__alpha_max=0.0))
"""Nothing in a step depends on how many there will be."""
RELAYED_NF4 = (*RELAYED, "model.quantize=nf4")
DIVERGED = (
    *sets(train__optimizer="sgd", train__save_every=1, train__steps=20, train__batch_tokens=192),
    "train.max_skipped=3",
    "train.lr={general: 1.0e+30}",
)

PATIENCE = (
    *sets(train__valid_every=2, train__patience=1, train__save_every=3, train__log_every=2),
    "train.lr={general: 0.0, specific: 0.0, gates: 0.0}",
)
"""Nothing improves: the second validation, at step 4, ends it."""

JOBS: dict[int, tuple[Job, ...]] = {
    1: (
        Job("sgd", (*SGD, *ROOMY)),
        Job("sgd-micro4", (*SGD, "train.micro_batch=4")),
        Job("sgd-pack128", (*SGD, "train.micro_batch=2", "train.pack_tokens=128")),
        Job("adamw", (*ADAMW, *ROOMY)),
        Job("adamw-micro4", (*ADAMW, "train.micro_batch=4")),
        Job("adamw-pack128", (*ADAMW, "train.pack_tokens=128")),
        Job("few", FEW),
        Job("recompute", (*ADAMW, *ROOMY, "train.activation_checkpointing=true")),
        Job("none", ABSENT),
        Job("output", OUTPUT),
        Job("layers", LAYERS),
        Job("lora", LORA),
        Job("shira", SHIRA),
        Job("full", FULL, PREPARE_AND_TRAIN),
        Job("lower", LOWER, TRAIN_LOWER),
        Job("replay", REPLAY, PREPARE_AND_TRAIN),
        Job("cpo", CPO, PREPARE_AND_TRAIN),
        Job("further", STAYS, FURTHER),
        Job("relayed", RELAYED),
        Job("bfloat16", BFLOAT16),
        Job("further-bfloat16", STAYS_ROUNDED, FURTHER),
        Job("whole", WHOLE, EVERY_STAGE),
        Job("experts", EXPERTS, EVERY_STAGE),
        Job("detect", (), DETECT),
        Job("detect-large", ("detect.batch_tokens=4096",), DETECT),
        *(
            (
                Job("nf4", (*NF4, *ONE_REPLICATED), EVERY_STAGE),
                Job("int8-lora", (*INT8_LORA, *ONE_REPLICATED)),
                Job("relayed-nf4", (*RELAYED_NF4, *ONE_REPLICATED)),
            )
            if HAS_BITSANDBYTES
            else ()
        ),
    ),
    2: (
        Job("sgd", (*SGD, "train.micro_batch=2", "train.valid_every=4")),
        Job("adamw", ADAMW),
        Job("none", ABSENT, WATCH),
        Job(
            "input",
            sets(routing__budget_weight=0.5, routing__budget=0.2, train__steps=5, train__clip=0.3),
            GATHER,
        ),
        Job("output", OUTPUT, GATHER),
        Job("full", sets(train__method="full", train__steps=3, train__weight_decay=0.1)),
        Job("cached", CACHED),
        Job("replay", (*REPLAY, "train.prefix_cache=disk"), PREPARE_AND_TRAIN),
        Job("cpo", CPO, PREPARE_AND_TRAIN),
        Job("layers", LAYERS, GATHER),
        Job("lora", LORA, GATHER),
        Job("shira", SHIRA, GATHER),
        Job("nudged", sets(train__steps=2), NUDGE),
        Job("patience", PATIENCE),
        Job("averaged", AVERAGED),
        Job("bfloat16", BFLOAT16),
        Job("looked-into", sets(model__dtype="bfloat16"), LOOK),
        Job("experts", (*EXPERTS, "translate.weights=sharded"), EVERY_STAGE),
        Job("collectives", (), COLLECTIVES),
        Job("detect", (), DETECT),
        # Last, because it ends in an error.
        Job("diverged", DIVERGED, DIVERGE),
    ),
    4: (
        Job("sgd", SGD),
        Job("adamw", ADAMW),
        Job("few", FEW),
        Job("detect", (), DETECT),
        Job("collectives", (), COLLECTIVES),
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
