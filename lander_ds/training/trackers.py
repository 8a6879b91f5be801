"""Where figures go besides metrics.jsonl and TensorBoard: Weights & Biases and MLflow, through their own clients.

Server, project, log-in and offline modes are said in the clients' own environment variables, `WANDB_*` and `MLFLOW_*`.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.util import find_spec
from types import TracebackType
from typing import Protocol

from lander_ds.common.errors import ConfigError
from lander_ds.common.files import read_json, write_json
from lander_ds.common.nested import flatten
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.recipe import Recipe
from lander_ds.distributed import collectives, process_group

logger = logging.getLogger(__name__)

MLFLOW_PARAMETERS = 100
"""Most parameters that MLflow takes at one time."""


class Tracker(Protocol):
    """A run in a tracker."""

    id: str
    """Under which the tracker knows it."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record figures of a step."""

    def close(self, finished: bool) -> None:
        """Hand over what is left; `finished`: training came to its end."""


class Wandb:
    """A run of Weights & Biases; its files lie in `wandb/` of the run directory."""

    def __init__(self, recipe: Recipe, run: RunDirectory, known: str | None) -> None:
        """Start a run, or go on with the one called `known`."""
        import wandb  # noqa: PLC0415

        name = os.environ.get("WANDB_NAME", run.path.resolve().name)
        self._run = wandb.init(
            id=known,
            resume="allow",
            name=name,
            dir=str(run.path),
            config=asdict(recipe),
            allow_val_change=True,
        )
        # Not the step of W&B, which only grows: after an interruption some steps are done again.
        self._run.define_metric("*", step_metric="step")
        self.id = str(self._run.id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record figures of a step."""
        self._run.log({"step": step, **values})

    def close(self, finished: bool) -> None:
        """Wait until everything is uploaded, or on disk in offline mode."""
        self._run.finish(exit_code=0 if finished else 1)


class Mlflow:
    """A run of MLflow, by default in a file store in `mlruns/` of the run directory."""

    def __init__(self, recipe: Recipe, run: RunDirectory, known: str | None) -> None:
        """Start a run, or go on with the one called `known`."""
        from mlflow.entities import Metric, Param  # noqa: PLC0415
        from mlflow.tracking import MlflowClient  # noqa: PLC0415

        self._metric = Metric
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None:
            uri = (run.path / "mlruns").resolve().as_uri()
            # MLflow would rather have a data base, for what a single run does not need.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._client = MlflowClient(tracking_uri=uri)
        if known is not None:
            self._client.update_run(known, status="RUNNING")
            self.id = known
            return
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "Default")
        existing = self._client.get_experiment_by_name(experiment)
        where = self._client.create_experiment(experiment) if existing is None else existing.experiment_id
        name = os.environ.get("MLFLOW_RUN_NAME", run.path.resolve().name)
        self.id = str(self._client.create_run(where, run_name=name).info.run_id)
        values = flatten(asdict(recipe), lists=True).items()
        parameters = [Param(_mlflow_name(key), str(value)) for key, value in values]
        for first in range(0, len(parameters), MLFLOW_PARAMETERS):
            self._client.log_batch(self.id, params=parameters[first : first + MLFLOW_PARAMETERS])

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record figures of a step."""
        now = int(time.time() * 1000)
        metrics = [self._metric(_mlflow_name(name), value, now, step) for name, value in values.items()]
        self._client.log_batch(self.id, metrics=metrics)

    def close(self, finished: bool) -> None:
        """Say how it ended."""
        self._client.set_terminated(self.id, "FINISHED" if finished else "FAILED")


KINDS: dict[str, Callable[[Recipe, RunDirectory, str | None], Tracker]] = {"wandb": Wandb, "mlflow": Mlflow}
"""By their names in `train.trackers`, which are also those of their modules; TensorBoard is DeepSpeed's."""


class Trackers:
    """Those of a training, on rank 0; on the other ranks there are none. One that fails is left out from then on."""

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self._trackers = dict(trackers)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record figures of a step in every tracker."""
        self._each(lambda tracker: tracker.log(values, step))

    def close(self, finished: bool) -> None:
        """Hand over what is left; `finished`: training came to its end."""
        self._each(lambda tracker: tracker.close(finished))

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(finished=kind is None)

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                action(tracker)
            except Exception as error:  # whatever a client raises: training is worth more than its curves
                del self._trackers[name]
                logger.warning(
                    "%s fails and gets no more figures of this training (%s); metrics.jsonl has all of them",
                    name,
                    _one_line(error),
                )


def installed(name: str) -> bool:
    """Whether a package is installed, such as a tracker's client. A directory `wandb/` or `mlruns/` in the way is none."""
    spec = find_spec(name)
    return spec is not None and spec.origin is not None


def open_trackers(recipe: Recipe, run: RunDirectory, resumed: bool) -> Trackers:
    """Start the trackers of `train.trackers` on rank 0, or go on with the runs that the run directory names (collective).

    Args:
        recipe: recorded as their configuration.
        run: where their ids are kept.
        resumed: whether training goes on.

    Raises:
        ConfigError: a tracker cannot be started.
    """
    opened: dict[str, Tracker] = {}
    refusal: str | None = None
    if process_group.rank() == 0:
        if not resumed:
            run.trackers.unlink(missing_ok=True)
        kept = read_json(run.trackers, "delete it") if run.trackers.exists() else {}
        for name in (name for name in recipe.train.trackers if name in KINDS):
            try:
                opened[name] = KINDS[name](recipe, run, kept.get(name))
            except Exception as error:  # whatever a client raises
                why = f"{name} cannot be started ({_one_line(error)})"
                refusal = f"train.trackers: {why}: see docs/tracking.md, or take it out"
                Trackers(opened).close(finished=False)
                break
        if opened:
            write_json(run.trackers, {**kept, **{name: tracker.id for name, tracker in opened.items()}})
    refusal = collectives.from_rank_zero(refusal)
    if refusal is not None:
        raise ConfigError(refusal)
    return Trackers(opened)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _mlflow_name(name: str) -> str:
    return re.sub(r"[^\w\-./: ]", "_", name)
