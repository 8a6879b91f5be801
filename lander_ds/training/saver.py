"""From a session to a checkpoint: every rank gathers its share of the trained tensors, their optimizer
state and averages."""

from __future__ import annotations

from typing import Any

import torch

from lander_ds.checkpoint.retention import Retention
from lander_ds.checkpoint.writer import Parts, Writer
from lander_ds.common.run_directory import RunDirectory
from lander_ds.distributed import collectives, process_group
from lander_ds.distributed.engines.engine import AVERAGE
from lander_ds.training.progress import Progress
from lander_ds.training.session import METHODS_WITH_SELECTION, Session
from lander_ds.training.validation import Validation


class Saver:
    """Saves checkpoints of one session."""

    def __init__(self, session: Session, run: RunDirectory, identity: dict[str, Any]) -> None:
        """Prepare (collective).

        Args:
            session: what is trained.
            run: where checkpoints and selection lie.
            identity: what the checkpoints belong to.
        """
        train = session.recipe.train
        self._session, self._run, self._identity = session, run, identity
        retention = Retention(train.keep_last, train.keep_every, train.keep_best != "off")
        self._writer = Writer(run.checkpoints, retention, train.save_in_background)

    def __call__(self, progress: Progress, measured: Validation | None) -> None:
        """Save `step-N`; returns once everything is in host memory (collective)."""
        session = self._session
        dims, ranks = session.dims, collectives.gather_objects(session.engine.group_steps())
        trained: dict[str, torch.Tensor] = {}
        optimizer: dict[str, torch.Tensor] = {}
        averaged: dict[str, torch.Tensor] = {}
        # The ranks of a pipeline stage take turns, so that all write.
        for name, moment, tensor in session.engine.state_tensors(
            lambda i: i % dims.data_parallel_ranks == dims.data_parallel_rank
        ):
            if moment is None:
                trained[name] = tensor
            elif moment == AVERAGE:
                averaged[name] = tensor
            else:
                optimizer[f"{moment}/{name}"] = tensor
        description = {
            **self._identity,
            "topology": session.recipe.topology,
            "ranks": process_group.world_size(),
            "group_steps": {name: count for steps in ranks for name, count in steps.items()},
            "progress": progress.as_json(),
            "valid_loss": None if measured is None else measured.mean_loss,
            **self._scored(measured),
        }
        with_selection = session.recipe.train.method in METHODS_WITH_SELECTION
        selection = self._run.selection if with_selection else None
        parts = Parts(trained, optimizer, averaged if progress.averaged else {})
        self._writer.save(progress.done, parts, description, selection)

    def _scored(self, measured: Validation | None) -> dict[str, float | None]:
        metric = self._session.recipe.train.translated_metric
        mean = None if measured is None else measured.mean_score
        return {} if metric is None else {f"valid_{metric}": mean}

    def finish(self) -> None:
        """Wait until the last checkpoint is on disk (collective).

        Raises:
            SaveFailed: it could not be written.
        """
        self._writer.finish()
