"""Trainings outside zero3 that several tests look at, and the worlds they run in.

A job is called `<topology>-<pipeline stages>x<data-parallel ranks>-<what>`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from support.training_runs import (
    ABSENT,
    ADAMW,
    AVERAGED,
    BFLOAT16,
    CACHED,
    CPO,
    DETECT,
    DIVERGE,
    DIVERGED,
    EVERY_STAGE,
    EXPERTS,
    FEW,
    FULL,
    GATHER,
    HAS_BITSANDBYTES,
    INT8_LORA,
    LAYERS,
    LOOK,
    LORA,
    LOWER,
    NF4,
    NUDGE,
    ONE_REPLICATED,
    OUTPUT,
    PREPARE_AND_TRAIN,
    RELAY,
    RELAYED,
    RELAYED_NF4,
    REPLAY,
    ROOMY,
    SGD,
    SHIRA,
    TRAIN_LOWER,
    WATCH,
    WHOLE,
)
from support.worlds import Job, run_world

if TYPE_CHECKING:
    from support.tiny_run import TinyRun

REPLICATED, PIPELINE, ZERO3 = "replicated", "pipeline", "pipeline_zero3"


def staged(
    topology: str,
    stages: int,
    ranks: int,
    what: str,
    overrides: tuple[str, ...],
    call: str = "",
    json: str = "",
) -> Job:
    """A job in a topology; `json`: another DeepSpeed JSON than that of its name."""
    own = (f"topology={topology}", f"pipeline_stages={stages}", f"deepspeed=$root/{json or topology}.json")
    name = f"{topology}-{stages}x{ranks // stages}-{what}"
    return Job(name, (*overrides, *own), call) if call else Job(name, (*overrides, *own))


def _two(topology: str) -> tuple[Job, ...]:
    """Two stages of one rank each, or one of two ranks."""
    stages = 1 if topology == REPLICATED else 2

    def job(what: str, overrides: tuple[str, ...], call: str = "") -> Job:
        return staged(topology, stages, 2, what, overrides, call)

    other = (
        ("train.micro_batch=2",) if topology == PIPELINE else ("train.micro_batch=2", "train.pack_tokens=128")
    )
    cut = () if topology == REPLICATED else ("pipeline_cut=[2]",)
    return (
        job("sgd", (*SGD, *other, "train.valid_every=4")),
        # Of several micro-batches the last one's gradients are reduced during its backward pass.
        staged(
            topology, stages, 2, "adamw", ADAMW, json="replicated-overlap" if topology == REPLICATED else ""
        ),
        job("recompute", (*ADAMW, *ROOMY, "train.activation_checkpointing=true")),
        job("detect", (), DETECT),
        job("none", ABSENT, WATCH),
        job("output", OUTPUT, GATHER),
        job("layers", LAYERS, GATHER),
        job("lora", LORA, GATHER),
        job("shira", SHIRA),
        job("full", FULL, PREPARE_AND_TRAIN),
        job("lower", (*LOWER, *cut), TRAIN_LOWER),
        job("nudged", ("train.steps=2",), NUDGE),
        job("replay", REPLAY, PREPARE_AND_TRAIN),
        job("cpo", CPO, PREPARE_AND_TRAIN),
        job("averaged", AVERAGED),
        job("bfloat16", BFLOAT16),
        job("looked-into", ("model.dtype=bfloat16",), LOOK),
        job("whole", (*WHOLE, "translate.weights=sharded"), EVERY_STAGE),
        *((job("experts", EXPERTS, EVERY_STAGE),) if topology == PIPELINE else ()),
        *(
            (job("nf4", (*NF4, "translate.weights=sharded"), EVERY_STAGE), job("int8-lora", INT8_LORA))
            if HAS_BITSANDBYTES and topology != ZERO3
            else ()
        ),
    )


def _four(topology: str) -> tuple[Job, ...]:
    """Two stages of two ranks each, and four stages."""
    return (
        staged(topology, 2, 4, "sgd", SGD),
        staged(topology, 2, 4, "adamw", ADAMW),
        staged(topology, 2, 4, "few", FEW),
        staged(topology, 2, 4, "detect", (), DETECT),
        staged(topology, 2, 4, "recompute", (*ADAMW, *ROOMY, "train.activation_checkpointing=true")),
        staged(topology, 4, 4, "sgd", SGD),
        staged(topology, 4, 4, "adamw", ADAMW),
        staged(topology, 4, 4, "detect", (), DETECT),
    )


def _four_replicated() -> tuple[Job, ...]:
    """Four ranks."""
    return (
        staged(REPLICATED, 1, 4, "sgd", SGD),
        staged(REPLICATED, 1, 4, "adamw", ADAMW),
        staged(REPLICATED, 1, 4, "few", FEW),
        staged(REPLICATED, 1, 4, "detect", (), DETECT),
    )


STAGE_JOBS: dict[int, tuple[Job, ...]] = {
    2: (
        *_two(REPLICATED),
        *_two(PIPELINE),
        *_two(ZERO3),
        staged(REPLICATED, 1, 2, "cached", CACHED),
        Job("relay", RELAYED, RELAY),
        *((Job("relay-nf4", (*RELAYED_NF4, *ONE_REPLICATED), RELAY),) if HAS_BITSANDBYTES else ()),
        # Last, because they end in an error.
        staged(REPLICATED, 1, 2, "diverged", DIVERGED, DIVERGE),
        staged(ZERO3, 2, 2, "diverged", DIVERGED, DIVERGE),
        staged(PIPELINE, 2, 2, "diverged", DIVERGED, DIVERGE),
    ),
    4: (
        *_four_replicated(),
        *_four(PIPELINE),
        *_four(ZERO3),
        staged(ZERO3, 2, 4, "whole", WHOLE, EVERY_STAGE),
    ),
}
"""By number of ranks."""


def _world(ranks: int) -> Callable[..., TinyRun]:
    @pytest.fixture(scope="session", name=f"stages_{ranks}")
    def world(tiny_run: TinyRun) -> TinyRun:
        run_world(tiny_run.root, ranks, STAGE_JOBS[ranks])
        return tiny_run

    return world


stages_2, stages_4 = map(_world, (2, 4))
"""All jobs of that many ranks have run; their run directories are `<job>-<ranks>`."""
