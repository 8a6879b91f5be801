"""Translating validation sentences during training: the score is that of stage translate, and training never notices."""

from __future__ import annotations

import json
from statistics import fmean
from typing import Any

import pytest
from sacrebleu.metrics import CHRF
from support.compare import metrics, validations
from support.jobs import NOTES
from support.neural import calls, metric_model, stand_in
from support.tiny_run import PAIRS, TinyRun
from support.training_runs import sets
from support.worlds import Job, run_world

from lander_ds.checkpoint import checkpoint
from lander_ds.checkpoint.choice import chosen
from lander_ds.common.run_directory import RunDirectory

pytestmark = pytest.mark.distributed

COMMON = (
    *sets(train__steps=4, train__valid_every=2, train__save_every=2, train__schedule="constant"),
    *sets(translate__max_new_tokens=5, translate__split="valid", translate__batch_size=3),
    "translate.systems=[trained]",
)
CHRF_BEST = (*COMMON, "train.keep_best=chrf")
REPLICATED = ("topology=replicated", "deepspeed=$root/replicated.json")
CALL = "support.jobs:train_and_translate"


def by_metric(name: str) -> tuple[str, ...]:
    """Goes by a neural metric of the stand-in in `$root/comet`."""
    neural = (f"score.neural.{name}.model=$root/{name}", f"score.neural.{name}.python=$root/comet/bin/python")
    return (*COMMON, *neural, f"train.keep_best={name}")


JOBS = (
    Job("by-loss", COMMON),
    Job("by-chrf", CHRF_BEST, CALL),
    Job("by-chrf-replicated", (*CHRF_BEST, *REPLICATED), CALL),
    Job("by-chrf-lora", (*CHRF_BEST, *REPLICATED, "train.method=lora"), CALL),
    Job("by-metric", by_metric("lengths"), CALL),
    Job("by-damaged", by_metric("damaged"), "support.jobs:diverge"),
    Job("by-chrf-few", (*CHRF_BEST, "train.valid_examples=1"), CALL),
)


@pytest.fixture(scope="module")
def runs(tiny_run: TinyRun) -> TinyRun:
    """All jobs, on two ranks."""
    stand_in(tiny_run.root / "comet")
    metric_model(tiny_run.root / "lengths")
    metric_model(tiny_run.root / "damaged", content="damaged")
    run_world(tiny_run.root, 2, JOBS)
    return tiny_run


def translated(run: RunDirectory, pair: str) -> list[dict[str, Any]]:
    """What stage translate has written."""
    lines = (run.translations / "trained" / f"{pair}.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 4
    return [json.loads(line) for line in lines]


def chrf_of(run: RunDirectory, pair: str) -> float:
    rows = translated(run, pair)
    return float(CHRF().corpus_score([row["hyp"] for row in rows], [[row["ref"] for row in rows]]).score)


@pytest.mark.parametrize("name", ["by-chrf", "by-chrf-replicated", "by-chrf-lora"])
def test_it_is_the_score_of_the_translations_that_the_checkpoint_gives(runs: TinyRun, name: str) -> None:
    run = runs.run(f"{name}-2")
    first, last = validations(run)
    expected = {pair: chrf_of(run, pair) for pair in PAIRS}
    assert last["valid_chrf"] == pytest.approx(expected)
    assert any(expected.values()), "translations of nothing would agree whatever they are"
    assert last["valid_chrf_mean"] == pytest.approx(sum(expected.values()) / len(PAIRS))
    saved = checkpoint.newest(run.checkpoints)
    assert saved.state["valid_chrf"] == last["valid_chrf_mean"]
    best = max((first, last), key=lambda record: record["valid_chrf_mean"])
    assert chosen(run.checkpoints, "best").step == best["step"]
    assert saved.state["progress"]["best"] == best["valid_chrf_mean"]
    assert json.loads(run.training_summary.read_text())["frozen_unchanged"]


def test_a_neural_metric_says_which_is_best(runs: TinyRun) -> None:
    run = runs.run("by-metric-2")
    first, last = validations(run)
    expected = {
        pair: fmean(len(row["hyp"]) / (len(row["hyp"]) + len(row["ref"])) for row in translated(run, pair))
        for pair in PAIRS
    }
    assert last["valid_lengths"] == pytest.approx(expected)
    assert last["valid_lengths_mean"] == pytest.approx(fmean(expected.values()))
    saved = checkpoint.newest(run.checkpoints)
    assert saved.state["valid_lengths"] == last["valid_lengths_mean"]
    assert saved.state["progress"]["criterion"] == "lengths"
    best = max((first, last), key=lambda record: record["valid_lengths_mean"])
    assert chosen(run.checkpoints, "best").step == best["step"]
    # Rank 0 alone scores.
    assert sum("loaded" in call for call in calls(runs.root / "lengths")) <= 2


def test_a_metric_that_fails_ends_every_rank(runs: TinyRun) -> None:
    run = runs.run("by-damaged-2")
    for rank in range(2):
        assert "score.neural.damaged" in (run.path / f"{rank}-{NOTES}").read_text()


def test_training_never_notices(runs: TinyRun) -> None:
    plain, translating = runs.run("by-loss-2"), runs.run("by-chrf-2")
    keys = ("loss", "loss_per_pair", "grad_norm", "gates")
    for one, other in zip(metrics(plain), metrics(translating), strict=True):
        assert {key: one[key] for key in keys} == {key: other[key] for key in keys}
    losses = [[record["valid_loss"] for record in validations(run)] for run in (plain, translating)]
    assert losses[0] == losses[1]
    assert not any("valid_chrf" in record for record in validations(plain))


def test_as_many_sentences_as_validation_reads(runs: TinyRun) -> None:
    """One per pair: one of the two ranks has none, and takes part all the same."""
    one, all_of_them = (validations(runs.run(f"by-chrf{name}-2"))[-1] for name in ("-few", ""))
    assert set(one["valid_chrf"]) == set(PAIRS)
    assert one["valid_chrf"] != all_of_them["valid_chrf"]


def test_what_a_checkpoint_keeps_of_it(runs: TinyRun) -> None:
    run = runs.run("by-chrf-2")
    state = checkpoint.load(run.checkpoints / "step-2").state
    assert state["train"]["keep_best"] == state["progress"]["criterion"] == "chrf"
    assert state["progress"]["best"] == state["valid_chrf"] == validations(run)[0]["valid_chrf_mean"]
