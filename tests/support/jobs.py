"""What the ranks of a test world run besides whole stages; imported in the ranks."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lander_ds.common.errors import LanderError
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.deepspeed_topology import ZERO_STAGE
from lander_ds.config.recipe import Recipe, Topology
from lander_ds.data.prepared import PreparedData
from lander_ds.distributed import accelerator, collectives, process_group
from lander_ds.distributed.engines import zero3
from lander_ds.distributed.engines.deepspeed_internals import local_shard
from lander_ds.distributed.start import Start
from lander_ds.models.parameter_groups import active_groups
from lander_ds.stages import detect, prepare, select, train, translate
from lander_ds.stages.catalogue import STAGES
from lander_ds.training.session import Session, open_session
from lander_ds.training.trainer import Outcome, Trainer
from lander_ds.training.validation import validation_loss
from support.tiny_run import TinyRun

GATHERED = "gathered.safetensors"
WATCHED = "watched.json"
NOTES = "notes.json"
RELAY: tuple[Topology, ...] = ("replicated", "zero3", "replicated", "pipeline")


def train_and_gather(recipe: Recipe, run: RunDirectory) -> None:
    """Stage train; whole parameters as they stand on the ranks afterwards go to a file per pipeline stage."""
    summary = train._summary

    def gathering(session: Session, *rest: Any) -> dict[str, Any]:
        whole = {}
        for name, parameter in session.engine.named_parameters():
            with zero3.gather([parameter]) if hasattr(parameter, "ds_tensor") else nullcontext():
                whole[name] = parameter.detach().clone()
        if session.dims.data_parallel_rank == 0:
            save_file(whole, run.path / f"{session.dims.pipeline_stage}-{GATHERED}")
        return summary(session, *rest)

    train._summary = gathering  # type: ignore[assignment]
    try:
        train.run(recipe, run)
    finally:
        train._summary = summary


def gathered(run: RunDirectory) -> dict[str, torch.Tensor]:
    """What `train_and_gather` has written."""
    whole: dict[str, torch.Tensor] = {}
    for path in run.path.glob(f"*-{GATHERED}"):
        whole.update(load_file(path))
    return whole


def train_and_translate(recipe: Recipe, run: RunDirectory) -> None:
    """Stages train and translate."""
    train.run(recipe, run)
    translate.run(recipe, run)


def track_in_two_goes(recipe: Recipe, run: RunDirectory) -> None:
    """Stage train up to step 2, then on from its checkpoint, with trackers that need no server."""
    # Here: the server that forks the ranks may be older than the environment of the test.
    os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true")
    train.run(replace(recipe, train=replace(recipe.train, steps=2)), run)
    train.run(recipe, run, auto_resume=True)


def train_lower(recipe: Recipe, run: RunDirectory) -> None:
    """Stage train with banks in layer 1 alone."""
    if process_group.rank() == 0:
        TinyRun(run.path.parent).selection((1,)).save(run.selection)
    collectives.barrier()
    train.run(recipe, run)


def prepare_and_train(recipe: Recipe, run: RunDirectory) -> None:
    """Stages prepare and train, for a base model of its own."""
    prepare.run(recipe, run)
    train.run(recipe, run)


def select_and_train(recipe: Recipe, run: RunDirectory) -> None:
    """Stages detect, select and train, with the selection of the run that training starts from."""
    detect.run(recipe, run)
    if process_group.rank() == 0:
        run.selection.unlink()
        select.run(recipe, run)
    collectives.barrier()
    train.run(recipe, run)


def every_stage(recipe: Recipe, run: RunDirectory) -> None:
    """What `lander all` does, in this process group; the report, which rank 0 makes of files, with one rank alone."""
    if process_group.rank() == 0:
        run.selection.unlink()
    collectives.barrier()
    for name in STAGES:
        if name != "report" or process_group.world_size() == 1:
            import_module(f"lander_ds.stages.{name}").run(recipe, run)
            accelerator.free_memory()


def relay(recipe: Recipe, run: RunDirectory) -> None:
    """Stage train, two steps at a time, each two in another topology and from the checkpoint of those before; with a
    quantised base, which ZeRO-3 does not take, `replicated` in its place."""
    ways = RELAY if recipe.model.quantize is None else ("replicated", "replicated", "replicated", "pipeline")
    for number, topology in enumerate(ways, 1):
        stages = 2 if topology == "pipeline" else 1
        own = replace(
            recipe, topology=topology, pipeline_stages=stages, train=replace(recipe.train, steps=2 * number)
        )
        train.run(replace(own, deepspeed=str(run.path.parent / f"{topology}.json")), run, auto_resume=True)


class _Nudging(Trainer):
    """Changes one frozen weight on the last rank by the smallest step there is."""

    def run(self) -> Outcome:
        outcome = super().run()
        if process_group.rank() == process_group.world_size() - 1:
            parameter = next(p for p in self.session.model.parameters() if not p.requires_grad)
            shard = local_shard(parameter).data.view(-1)
            shard[-1] = torch.nextafter(shard[-1], torch.tensor(torch.inf))
        return outcome


def train_and_nudge(recipe: Recipe, run: RunDirectory) -> None:
    """Stage train with a defect: a frozen weight changes."""
    train.Trainer = _Nudging  # type: ignore[attr-defined]
    try:
        train.run(recipe, run)
    finally:
        train.Trainer = Trainer  # type: ignore[attr-defined]


class _Watching(Trainer):
    """Notes after every step which groups changed on this rank, in weights or in optimizer state."""

    def run(self) -> Outcome:
        self._notes: list[dict[str, Any]] = []
        self._before = _states(self.session)
        outcome = super().run()
        if process_group.rank() == 0:
            (RunDirectory(self.session.recipe.run_dir).path / WATCHED).write_text(json.dumps(self._notes))
        return outcome

    def _step(self, step: int, stop: bool) -> tuple[dict[str, Any], bool]:
        result = super()._step(step, stop)
        after = _states(self.session)
        changed = [group for group in after if not _equal(self._before[group], after[group])]
        sizes = self.session.group_sizes
        present = [self.pairs[i] for i in sorted(set(self.plan.batch(step).pair_ids.tolist()))]
        self._notes.append(
            {
                "present": present,
                "active": sorted(active_groups(sizes, present)),
                "changed": sorted({group for part in collectives.gather_objects(changed) for group in part}),
                "groups": sorted(sizes),
            }
        )
        self._before = after
        return result


def train_and_watch(recipe: Recipe, run: RunDirectory) -> None:
    """As `train_and_gather`, with a note of the groups that each step changed."""
    train.Trainer = _Watching  # type: ignore[attr-defined]
    try:
        train_and_gather(recipe, run)
    finally:
        train.Trainer = Trainer  # type: ignore[attr-defined]


def look_into_session(recipe: Recipe, run: RunDirectory) -> None:
    """Note types of parameters and buffers, and validation losses of all pairs, of one alone and of few sentences."""
    session, data = open_session(Start(recipe, run)), PreparedData.load(run, recipe)
    valid = dict(enumerate(data.split("valid").values()))
    few = replace(session, recipe=replace(recipe, train=replace(recipe.train, valid_examples=1)))
    notes = {
        "parameters": sorted({str(p.dtype) for p in session.model.parameters()}),
        "rotary": sorted({str(b.dtype) for name, b in session.model.named_buffers() if "inv_freq" in name}),
        "all": validation_loss(session, valid).losses,
        "one": validation_loss(session, {2: valid[2]}).losses,
        # One sentence: most micro-batches and perhaps ranks have none.
        "few": validation_loss(few, {2: valid[2]}).losses,
    }
    if process_group.rank() == 0:
        (run.path / NOTES).write_text(json.dumps(notes))
    session.engine.destroy()


def use_collectives(recipe: Recipe, run: RunDirectory) -> None:
    """Note what every collective returns on every rank."""
    rank, ranks = process_group.rank(), process_group.world_size()
    summed = torch.full((2,), float(rank + 1), dtype=torch.float64)
    returned = collectives.sum_over_ranks(summed)
    notes = {
        "sum": summed.tolist(),
        "same": returned is summed,
        "gathered": collectives.gather_objects({"rank": rank}),
        "from_zero": collectives.from_rank_zero(f"of rank {rank}"),
        "share": list(collectives.share(range(10))),
    }
    (run.path / f"{rank}-{NOTES}").write_text(json.dumps(notes))
    collectives.barrier()
    assert all((run.path / f"{other}-{NOTES}").exists() for other in range(ranks))


def diverge(recipe: Recipe, run: RunDirectory) -> None:
    """Stage train, which must fail; every rank notes the error."""
    try:
        train.run(recipe, run)
    except LanderError as error:
        (run.path / f"{process_group.rank()}-{NOTES}").write_text(str(error))


def _states(session: Session) -> dict[str, list[torch.Tensor]]:
    """This rank's float32 masters and optimizer state by group; none where its stage trains nothing."""
    names = [group["name"] for group in session.engine.param_groups]
    actual: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    if not names:
        return actual
    zero = session.engine._engine.optimizer
    if ZERO_STAGE[session.recipe.topology] == 1:
        masters = dict(zip(names, ([part] for part in zero.single_partition_of_fp32_groups), strict=True))
    else:
        masters = {name: [] for name in names}
        for number, part in enumerate(zero.fp32_partitioned_groups_flat):
            masters[names[zero.sub_group_to_group_id[number]]].append(part)
    for name, parts in masters.items():
        for part in parts:
            actual[name].append(part.detach().clone())
            actual[name] += [torch.as_tensor(value).clone() for value in zero.optimizer.state[part].values()]
    return actual


def _equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
