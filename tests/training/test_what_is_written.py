"""The files of a training: metrics.jsonl, training.json, TensorBoard, checkpoints, and when it stops or is skipped."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support.compare import metrics, validations
from support.jobs import NOTES
from support.tiny_run import PAIRS, SELECTED, STEPS, TinyRun
from support.training_runs import ADAMW, ROOMY
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lander_ds.checkpoint import checkpoint
from lander_ds.common.errors import ArtefactError
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.recipe import Recipe
from lander_ds.method.selection import Selection
from lander_ds.stages import train
from lander_ds.training.metrics_logger import MetricsLogger
from lander_ds.training.session import load_selection, micro_batches
from lander_ds.training.validation import Validation

pytestmark = pytest.mark.distributed


def test_a_record_of_every_step(world_1: TinyRun) -> None:
    records = metrics(world_1.run("adamw-1"))
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    groups = json.loads(world_1.run("adamw-1").training_summary.read_text())["groups"]
    for number, record in enumerate(records):
        assert set(record) >= {
            *("step", "loss", "loss_per_pair", "budget_loss", "tokens", "target_tokens", "examples", "lr"),
            *("grad_norm", "gates", "alpha", "tokens_per_second", "seconds", "eta_seconds"),
        }
        assert set(record["loss_per_pair"]) <= set(PAIRS)
        assert set(record["lr"]) == set(groups)
        assert set(record["gates"]) == {str(layer) for layer in SELECTED}
        assert all(0 < c < 1 for gates in record["gates"].values() for c in gates.values())
        assert record["alpha"] == pytest.approx(number / (STEPS - 1))
        assert 0 < record["target_tokens"] < record["tokens"] <= 384
        assert record["tokens_per_second"] == pytest.approx(record["tokens"] / record["seconds"])
    assert records[-1]["eta_seconds"] == 0.0
    factor = 0.5 * (1 + math.cos(math.pi * (STEPS - 1) / STEPS))
    assert records[-1]["lr"]["general"] == pytest.approx(0.01 * factor)
    assert records[-1]["lr"]["specific:en-de"] == pytest.approx(0.02 * factor)
    assert records[-1]["lr"]["gates"] == pytest.approx(0.04 * factor)


def test_the_summary_of_a_training(world_2: TinyRun) -> None:
    actual = json.loads(world_2.run("adamw-2").training_summary.read_text())
    assert set(actual) >= {
        *("method", "trained_parameters", "total_parameters", "ranks", "steps", "stopped_early", "seconds"),
        *("weight_bytes_per_rank", "gradient_bytes_per_rank", "optimizer_bytes_per_rank"),
        *("frozen_unchanged", "groups", "checkpoint"),
    }
    assert (actual["method"], actual["ranks"], actual["steps"]) == ("lander", 2, STEPS)
    assert actual["checkpoint"] == f"checkpoints/step-{STEPS}"
    assert not actual["stopped_early"]


def test_validation_is_the_mean_over_pairs(world_1: TinyRun) -> None:
    [record] = validations(world_1.run("adamw-1"))
    assert record["step"] == STEPS
    assert record["valid_loss_mean"] == pytest.approx(sum(record["valid_loss"].values()) / 3)
    assert all(0 < value < 20 for value in record["valid_loss"].values())


def test_tensorboard(world_2: TinyRun) -> None:
    directory = world_2.run("patience-2").path / "tensorboard"
    events = EventAccumulator(str(directory)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/grad_norm", "valid/mean", "valid/en-de", "lr/general", "loss/en-fr"} <= tags
    assert {f"gate/layer{layer}/en-es" for layer in SELECTED} <= tags
    # Every second step is logged there; metrics.jsonl has all of them.
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    expected = {r["step"]: r["loss"] for r in metrics(world_2.run("patience-2")) if r["step"] % 2 == 0}
    assert losses == pytest.approx(expected, rel=1e-6)


def test_patience(world_2: TinyRun) -> None:
    run = world_2.run("patience-2")
    assert [record["step"] for record in validations(run)] == [2, 4]
    actual = json.loads(run.training_summary.read_text())
    assert (actual["steps"], actual["stopped_early"]) == (4, True)
    assert actual["checkpoint"] == "checkpoints/step-4"
    # Step 3 was asked for, step 4 is the end.
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-3", "step-4"]


def test_the_checkpoint_at_the_end_holds_the_trained_tensors(world_2: TinyRun) -> None:
    run = world_2.run("adamw-2")
    actual = checkpoint.newest(run.checkpoints)
    summary = json.loads(run.training_summary.read_text())
    assert sum(value.numel() for value in actual.trained().values()) == summary["trained_parameters"]
    assert actual.state["routing"]["alpha_max"] == 1.0
    assert actual.state["pairs"] == list(PAIRS)


def test_divergence_ends_with_an_error_and_whole_checkpoints(world_2: TinyRun) -> None:
    run = world_2.run("diverged-2")
    for rank in range(2):
        message = (run.path / f"{rank}-{NOTES}").read_text()
        assert re.search(
            r"the loss of .*en-.* is not finite at step \d+, after 3 skipped steps: lower train\.lr", message
        )
    assert checkpoint.newest(run.checkpoints).trained()
    assert not run.training_summary.exists()
    assert not run.record_path("train").exists()


def test_pairs_without_validation_data_are_left_out(world_2: TinyRun) -> None:
    """The others are validated as themselves: a pair's id is its place in the recipe."""
    notes = json.loads((world_2.run("looked-into-2").path / NOTES).read_text())
    assert set(notes["all"]) == set(PAIRS)
    assert set(notes["one"]) == set(notes["few"]) == {"en-es"}
    assert notes["one"]["en-es"] == pytest.approx(notes["all"]["en-es"], rel=1e-2)  # bfloat16
    assert 0 < notes["few"]["en-es"] < 20


def test_a_finished_training_is_not_repeated(world_1: TinyRun) -> None:
    """In this process, which has no process group: the stage must see that before it needs one."""
    run = world_1.run("adamw-1")
    before = run.metrics.stat()
    train.run(world_1.recipe("adamw-1", *ADAMW, *ROOMY), run)
    assert run.metrics.stat() == before


def recipe_in(runs: TinyRun, path: Path) -> tuple[Recipe, RunDirectory]:
    """A run of its own with data and selection."""
    shutil.copytree(runs.root / "prepared" / "data", path / "data")
    runs.selection().save(path / "selection.safetensors")
    return replace(runs.recipe("unused"), run_dir=str(path)), RunDirectory(path)


def test_a_selection_of_other_pairs_is_refused(tiny_run: TinyRun, tmp_path: Path) -> None:
    recipe, run = recipe_in(tiny_run, tmp_path)
    swapped = replace(recipe, data=replace(recipe.data, pairs=PAIRS[::-1]))
    fingerprint = tiny_run.selection().metadata["base_fingerprint"]
    with pytest.raises(
        ArtefactError, match=r"is for pairs en-de, en-fr, en-es.*run stages detect and select"
    ):
        load_selection(swapped, run, fingerprint)


def test_a_selection_of_another_base_is_refused(tiny_run: TinyRun, tmp_path: Path) -> None:
    recipe, run = recipe_in(tiny_run, tmp_path)
    with pytest.raises(ArtefactError, match="was made for another base model"):
        load_selection(recipe, run, "sha256:other")
    run.selection.unlink()
    with pytest.raises(ArtefactError, match="run stage select"):
        load_selection(recipe, run, "sha256:other")


@pytest.mark.parametrize(("method", "needed"), [("full", False), ("lora", False), ("layers", True)])
def test_which_methods_need_a_selection(tiny_run: TinyRun, tmp_path: Path, method: str, needed: bool) -> None:
    recipe, run = recipe_in(tiny_run, tmp_path)
    recipe = replace(recipe, train=replace(recipe.train, method=method))  # type: ignore[arg-type]
    actual = load_selection(recipe, run, tiny_run.selection().metadata["base_fingerprint"])
    assert isinstance(actual, Selection) == needed


@pytest.mark.parametrize(
    ("ranks", "micro_batch", "pack", "expected"),
    [
        (1, 1, 96, 4),
        (2, 1, 96, 2),
        (4, 1, 96, 1),
        (1, 4, 96, 1),
        (3, 1, 96, 2),
        (8, 4, 96, 1),
        (1, 1, 100, 4),
    ],
)
def test_micro_batches_hold_the_global_batch(
    tiny_run: TinyRun, ranks: int, micro_batch: int, pack: int, expected: int
) -> None:
    recipe = tiny_run.recipe("unused", f"train.micro_batch={micro_batch}", f"train.pack_tokens={pack}")
    assert micro_batches(recipe, ranks) == expected


class _NoMonitor:
    enabled = False


def test_the_journal_starts_anew_and_is_whole_after_every_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("of an earlier training\n")
    journal = MetricsLogger(path, _NoMonitor(), 1)
    record = {
        "skipped": False,
        "step": 1,
        "loss": 1.5,
        "grad_norm": 0.1,
        "tokens_per_second": 1.0,
        "loss_per_pair": {},
    }
    journal.step({**record, "lr": {}, "gates": {}})
    assert json.loads(path.read_text())["loss"] == 1.5, "written before the next step begins"
    journal.validation(1, Validation({"en-de": 1.0, "en-fr": 2.0}))
    journal.validation(1, Validation({"en-de": 1.0}, {"en-de": 30.0, "en-fr": 40.0}), "chrf")
    journal.close()
    _, plain, translated = map(json.loads, path.read_text().splitlines())
    assert plain == {"step": 1, "valid_loss": {"en-de": 1.0, "en-fr": 2.0}, "valid_loss_mean": 1.5}
    assert (translated["valid_chrf"], translated["valid_chrf_mean"]) == ({"en-de": 30.0, "en-fr": 40.0}, 35.0)
