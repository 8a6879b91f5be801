"""Jobs of a test world whose ranks believe that they are on several machines, and what travels between these."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed.comm.comm as of_deepspeed
import torch.distributed as dist

from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.recipe import Recipe
from lander_ds.distributed import collectives, nodes, process_group
from lander_ds.stages import train
from lander_ds.training.trainer import Trainer
from support.worlds import Job

TRAFFIC = "traffic.json"


@dataclass(frozen=True)
class OnNodes:
    """A job whose ranks take themselves for ranks on several machines."""

    job: Job
    nodes: str = "aabb"
    """A letter for the machine of every rank."""

    @property
    def name(self) -> str:
        """The job's."""
        return self.job.name

    def __call__(self, root: Path, ranks: int) -> None:
        """Run the job."""
        with patch.object(nodes, "this_node", lambda: self.nodes[process_group.rank()]):
            self.job(root, ranks)


@dataclass
class Traffic:
    """Bytes of gathered weights that this rank has received from the other two of four ranks, which are on another node."""

    frozen: int = 0
    trained: int = 0
    on_the_wire: int = 0
    """Frozen and trained together, as the process groups see it."""


def _others(group: Any) -> int:
    """How many ranks of a group are on another node than this rank."""
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    return sum(rank // 2 != process_group.rank() // 2 for rank in ranks)


@contextmanager
def counted(parameters: Iterable[Any], traffic: Traffic) -> Iterator[None]:
    """Within this context count what is gathered of ZeRO-3's parameters."""
    of_class, wire = ("all_gather_coalesced", "all_gather"), of_deepspeed.cdb
    before: list[tuple[Any, str, Any]] = []

    def exchange(owner: Any, name: str, other: Callable[[Any], Any]) -> None:
        before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, other(getattr(owner, name)))

    def by_parameter(gather: Any) -> Any:
        def gathering(param_list: Iterable[Any], *rest: Any, **options: Any) -> Any:
            wanted = list(param_list)
            for parameter in wanted:
                if parameter.ds_status.name == "NOT_AVAILABLE":
                    received = parameter.ds_tensor.nbytes * _others(parameter.ds_process_group)
                    traffic.trained += received if parameter.requires_grad else 0
                    traffic.frozen += 0 if parameter.requires_grad else received
            return gather(wanted, *rest, **options)

        return gathering

    def by_group(gather: Any) -> Any:
        def gathering(*, group: Any, **options: Any) -> Any:
            shard = options["input_tensor"] if "input_tensor" in options else options["tensor"]
            traffic.on_the_wire += shard.nbytes * _others(group)
            return gather(group=group, **options)

        return gathering

    for parameter in parameters:
        for name in of_class:
            exchange(parameter, name, by_parameter)
    for name in ("all_gather_into_tensor", "all_gather"):
        exchange(wire, name, by_group)
    try:
        yield
    finally:
        for owner, name, own in before:
            setattr(owner, name, own)


class _Counting(Trainer):
    """Counts the third step: DeepSpeed fetches ahead from the second on."""

    def _step(self, step: int, stop: bool) -> tuple[dict[str, Any], bool]:
        if step != 3:
            return super()._step(step, stop)
        traffic = Traffic()
        with counted(self.session.model.parameters(), traffic):
            result = super()._step(step, stop)
        of_ranks = collectives.gather_objects(asdict(traffic))
        if process_group.rank() == 0:
            (RunDirectory(self.session.recipe.run_dir).path / TRAFFIC).write_text(json.dumps(of_ranks))
        return result


def train_and_count(recipe: Recipe, run: RunDirectory) -> None:
    """Stage train; what travels in a step goes to a file."""
    train.Trainer = _Counting  # type: ignore[attr-defined]
    try:
        train.run(recipe, run)
    finally:
        train.Trainer = Trainer  # type: ignore[attr-defined]


def train_in_two_goes(recipe: Recipe, run: RunDirectory) -> None:
    """Stage train up to step 2, then on from its checkpoint with frozen weights sharded over all ranks."""
    train.run(replace(recipe, train=replace(recipe.train, steps=2)), run)
    train.run(replace(recipe, frozen_shards="world"), run, auto_resume=True)
