"""Weights & Biases and MLflow through their own clients, without network; skipped where they are not installed."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.tiny_run import PAIRS, TinyRun
from support.training_runs import sets
from support.worlds import Job, run_world

from lander_ds.common.errors import ConfigError
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.recipe import ModelConfig, Recipe
from lander_ds.config.schema.data import CorpusConfig, DataConfig
from lander_ds.config.schema.training import TrainConfig
from lander_ds.training import trackers
from lander_ds.training.trackers import Trackers, installed, open_trackers

needs_wandb = pytest.mark.skipif(not installed("wandb"), reason="wandb is not installed")
needs_mlflow = pytest.mark.skipif(not installed("mlflow"), reason="mlflow is not installed")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No server, whatever the environment says."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "MLFLOW_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    # Set by the code under test; undone here.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


def recipe_in(path: Path, *names: Any) -> tuple[Recipe, RunDirectory]:
    data = DataConfig(("en-de", "de-en"), (CorpusConfig("train.{pair}.jsonl"),))
    recipe = Recipe(str(path), ModelConfig("a/model"), data, "zero3.json", train=TrainConfig(trackers=names))
    path.mkdir(exist_ok=True)
    return recipe, RunDirectory(path)


def wandb_records(path: Path) -> list[Any]:
    """What an offline run has written: protobuf messages in a LevelDB log."""
    from wandb.proto.wandb_internal_pb2 import Record

    (log,) = path.glob("*.wandb")
    data, at, records, part = log.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last of several
            records.append(Record.FromString(part))
            part = b""
    return records


def finished_wandb_records(path: Path) -> list[Any]:
    """The same once the run's end is among them: W&B's service writes on after `finish` has returned."""
    end = time.monotonic() + 60
    while True:
        records = wandb_records(path)
        if any(record.HasField("exit") for record in records):
            return records
        assert time.monotonic() < end, f"{path} has no end"
        time.sleep(0.05)


def wandb_runs(run: RunDirectory) -> list[tuple[str, dict[str, Any], list[dict[str, Any]], list[int]]]:
    """Per start, in order: id, configuration, history, exit codes."""
    starts = []
    for path in sorted(path for path in (run.path / "wandb").glob("offline-run-*") if path.is_dir()):
        records = finished_wandb_records(path)
        described = next(record.run for record in records if record.HasField("run"))
        config = {item.key: json.loads(item.value_json) for item in described.config.update}
        rows = [
            {
                (item.nested_key[0] if item.nested_key else item.key): json.loads(item.value_json)
                for item in r.history.item
            }
            for r in records
            if r.HasField("history")
        ]
        exits = [record.exit.exit_code for record in records if record.HasField("exit")]
        starts.append((described.run_id, config, rows, exits))
    return starts


def mlflow_runs(run: RunDirectory) -> list[Any]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=(run.path / "mlruns").resolve().as_uri())
    return list(client.search_runs(["0"]))


def mlflow_steps(run: RunDirectory, name: str) -> list[tuple[int, float]]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=(run.path / "mlruns").resolve().as_uri())
    (found,) = mlflow_runs(run)
    return sorted(
        (metric.step, metric.value) for metric in client.get_metric_history(found.info.run_id, name)
    )


@needs_wandb
def test_wandb(tmp_path: Path) -> None:
    recipe, run = recipe_in(tmp_path / "mine", "wandb")
    with open_trackers(recipe, run, resumed=False) as opened:
        opened.log({"train/loss": 2.5}, 1)
    with suppress(KeyError), open_trackers(recipe, run, resumed=True) as opened:
        opened.log({"train/loss": 1.5, "lr/specific:en-de": 0.1}, 2)
        raise KeyError
    first, second = wandb_runs(run)
    assert first[0] == second[0] == json.loads(run.trackers.read_text())["wandb"]
    assert first[1]["data"]["pairs"] == ["en-de", "de-en"]
    assert [(row["step"], row["train/loss"]) for row in first[2] + second[2]] == [(1, 2.5), (2, 1.5)]
    assert second[2][0]["lr/specific:en-de"] == 0.1
    assert (first[3], second[3]) == ([0], [1])


@needs_mlflow
def test_mlflow(tmp_path: Path) -> None:
    recipe, run = recipe_in(tmp_path / "mine", "mlflow")
    with open_trackers(recipe, run, resumed=False) as opened:
        opened.log({"train/loss": 2.5}, 1)
        opened.log({"lr/specific:en-de+de-en": 0.1}, 1)
    with suppress(KeyError), open_trackers(recipe, run, resumed=True) as opened:
        opened.log({"train/loss": 1.5}, 2)
        raise KeyError
    (found,) = mlflow_runs(run)
    assert found.info.run_id == json.loads(run.trackers.read_text())["mlflow"]
    assert (found.info.run_name, found.info.status) == ("mine", "FAILED")
    assert (found.data.params["data.pairs.1"], found.data.params["train.steps"]) == ("de-en", "1000")
    assert mlflow_steps(run, "train/loss") == [(1, 2.5), (2, 1.5)]
    assert mlflow_steps(run, "lr/specific:en-de_de-en") == [(1, 0.1)]
    with open_trackers(recipe, run, resumed=False):
        pass
    assert len(mlflow_runs(run)) == 2, "a training that begins anew is another run"


@needs_mlflow
def test_one_that_cannot_be_started_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, run = recipe_in(tmp_path / "mine", "mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
    with pytest.raises(ConfigError, match=r"train\.trackers: mlflow cannot be started \(.*docs/tracking\.md"):
        open_trackers(recipe, run, resumed=False)
    assert not run.trackers.exists()


class _Fake:
    """A client that fails from some step on."""

    id = "fake"

    def __init__(self, fails_at: int) -> None:
        self.fails_at, self.logged, self.closed = fails_at, [], []  # type: int, list[int], list[bool]

    def log(self, values: Mapping[str, float], step: int) -> None:
        if step >= self.fails_at:
            raise ConnectionError("no\nroute")
        self.logged.append(step)

    def close(self, finished: bool) -> None:
        self.closed.append(finished)


def test_one_that_fails_is_left_out_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    broken, sound = _Fake(2), _Fake(99)
    with caplog.at_level(logging.WARNING), Trackers({"broken": broken, "sound": sound}) as opened:
        for step in (1, 2, 3):
            opened.log({"train/loss": 1.0}, step)
    assert (broken.logged, sound.logged) == ([1], [1, 2, 3])
    assert (broken.closed, sound.closed) == ([], [True])
    (record,) = caplog.records
    assert record.message.startswith("broken fails and gets no more figures of this training (no route)")


def test_a_directory_in_the_way_is_no_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no_such_client").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not installed("no_such_client")
    assert not installed("neither_a_client")
    assert installed("json")


def test_none_is_opened_unless_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        trackers, "KINDS", dict.fromkeys(trackers.KINDS, lambda *_: pytest.fail("was opened"))
    )
    recipe, run = recipe_in(tmp_path / "mine", "tensorboard")
    with open_trackers(recipe, run, resumed=False) as opened:
        opened.log({"train/loss": 1.0}, 1)
    assert not run.trackers.exists()


TRACKED = (
    *sets(train__steps=4, train__valid_every=2, train__save_every=2, train__schedule="constant"),
    "train.trackers=[wandb, mlflow]",
)


@pytest.mark.distributed
@needs_wandb
@needs_mlflow
def test_a_training_on_two_ranks_that_goes_on(tiny_run: TinyRun) -> None:
    run_world(tiny_run.root, 2, (Job("tracked", TRACKED, "support.jobs:track_in_two_goes"),))
    run = tiny_run.run("tracked-2")
    losses = [
        (record["step"], record["loss"])
        for record in map(json.loads, run.metrics.read_text().splitlines())
        if "loss" in record
    ]
    assert [step for step, _ in losses] == [1, 2, 3, 4]
    # As many runs as one rank opens, and all figures in them.
    first, second = wandb_runs(run)
    assert first[0] == second[0]
    rows = first[2] + second[2]
    assert [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row] == losses
    assert [row["step"] for row in rows if "valid/mean" in row] == [2, 4]
    (found,) = mlflow_runs(run)
    assert found.info.status == "FINISHED"
    assert mlflow_steps(run, "train/loss") == losses
    assert {f"valid/{pair}" for pair in PAIRS} <= set(found.data.metrics)
    assert not (run.path / "tensorboard").exists()
