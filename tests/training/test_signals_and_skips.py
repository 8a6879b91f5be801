"""What a training does when something goes wrong: signals, gradients that are not finite, a start that does not fit."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from support.compare import metrics, validations
from support.faulty import NOTES, SIGNAL_AT, SKIPPED
from support.tiny_run import TinyRun
from support.training_runs import ADAMW
from support.worlds import Job, run_world

from lander_ds.checkpoint import checkpoint

pytestmark = pytest.mark.distributed

STEPS = 6
FEW = (*ADAMW, f"train.steps={STEPS}", "train.save_every=2", "train.valid_every=2", "train.valid_examples=2")
AVERAGED = (*FEW, "train.average.last=4")
"""The signal comes after the first of these steps, or the second."""


@pytest.fixture(scope="module")
def faulty(tiny_run: TinyRun) -> TinyRun:
    jobs = (
        Job("in-peace", AVERAGED),
        Job("preempted", AVERAGED, "support.faulty:preempted_and_resumed"),
        Job("refused", (*FEW, "train.steps=2", "train.valid_every=0"), "support.faulty:refused"),
        Job("infinite", (*FEW, "train.max_skipped=1"), "support.faulty:infinite_gradients"),
    )
    run_world(tiny_run.root, 2, jobs)
    return tiny_run


def notes(faulty: TinyRun, name: str, rank: int) -> list[Any]:
    actual: list[Any] = json.loads((faulty.run(name).path / f"{rank}-{NOTES}").read_text())
    return actual


def test_a_signal_to_one_rank_stops_all(faulty: TinyRun) -> None:
    for rank in (0, 1):
        code, message = notes(faulty, "preempted-2", rank)
        assert code == 75
        wording = re.fullmatch(
            r"asked to stop: step (\d) is saved; start the same command with --auto-resume to go on",
            str(message),
        )
        assert wording is not None
        # The step at hand is finished; all ranks hear of it in that step or the next one.
        assert int(wording[1]) in (SIGNAL_AT, SIGNAL_AT + 1)
        saved = checkpoint.newest(faulty.run("preempted-2").path / "after-the-signal")
        assert saved.step == saved.state["progress"]["done"] == int(wording[1])


def test_after_a_signal_it_goes_on_as_if_nothing_had_happened(faulty: TinyRun) -> None:
    run, expected = faulty.run("preempted-2"), faulty.run("in-peace-2")
    assert [record["loss"] for record in metrics(run)] == [record["loss"] for record in metrics(expected)]
    assert validations(run) == validations(expected)
    one, other = checkpoint.newest(run.checkpoints), checkpoint.newest(expected.checkpoints)
    for actual, wanted in (
        (one.trained(), other.trained()),
        (one.optimizer(), other.optimizer()),
        (one.averaged(), other.averaged()),
    ):
        assert wanted
        assert set(actual) == set(wanted)
        assert all(torch.equal(actual[name], wanted[name]) for name in wanted)
    for key in ("step", "progress", "group_steps", "valid_loss"):
        assert one.state[key] == other.state[key]
    summaries = [json.loads(r.training_summary.read_text()) for r in (run, expected)]
    assert summaries[0]["steps"] == summaries[1]["steps"] == STEPS
    assert all(summary["frozen_unchanged"] for summary in summaries)


def test_a_signal_during_the_last_save_does_not_lose_it(tiny_run: TinyRun) -> None:
    run_world(tiny_run.root, 1, [Job("again", (*FEW, "train.steps=2"), "support.faulty:signalled_again")])
    assert checkpoint.newest(tiny_run.run("again-1").checkpoints).step == 2


def test_all_ranks_refuse_alike(faulty: TinyRun) -> None:
    for rank in (0, 1):
        wording = notes(faulty, "refused-2", rank)
        assert [code for code, _ in wording] == [2, 2]
        assert "--auto-resume goes on from there, --force deletes them" in wording[0][1]
        assert re.match(r"train\.steps: 1, but .*/step-2 has come further already: raise", wording[1][1])
    assert checkpoint.steps(faulty.run("refused-2").checkpoints) == [2]


def test_infinite_gradients_change_nothing(faulty: TinyRun) -> None:
    """Neither weights nor moments nor counts of steps; on the other ranks too."""
    for rank in (0, 1):
        unchanged = notes(faulty, "infinite-2", rank)
        assert [step for step, same in enumerate(unchanged, 1) if same] == list(SKIPPED)


def test_skipped_steps_are_counted(faulty: TinyRun) -> None:
    run = faulty.run("infinite-2")
    records = metrics(run)
    assert [record["step"] for record in records if record["skipped"]] == list(SKIPPED)
    assert [record["step"] for record in records if record["grad_norm"] is None] == list(SKIPPED)
    assert json.loads(run.training_summary.read_text())["skipped_steps"] == len(SKIPPED)
    progress = checkpoint.newest(run.checkpoints).state["progress"]
    assert (progress["done"], progress["skipped"], progress["skipped_in_a_row"]) == (STEPS, len(SKIPPED), 0)
    after = checkpoint.load(run.checkpoints / "step-4").state["progress"]
    assert (after["skipped"], after["skipped_in_a_row"]) == (2, 1)
