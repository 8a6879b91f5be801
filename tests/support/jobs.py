"""What the ranks of a test world run besides whole stages; imported in the ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import save_file

from lander_ds.config.recipe import Recipe
from lander_ds.data.prepared import PreparedData
from lander_ds.errors import LanderError
from lander_ds.parallel import comm, zero3
from lander_ds.run import RunDirectory
from lander_ds.stages import train
from lander_ds.training.groups import active_groups
from lander_ds.training.journal import Journal
from lander_ds.training.loop import Loop, Outcome
from lander_ds.training.session import Session, open_session
from lander_ds.training.validation import validation_loss

GATHERED = "gathered.safetensors"
WATCHED = "watched.json"
NOTES = "notes.json"


def train_and_gather(recipe: Recipe, run: RunDirectory) -> None:
    """Stage train; whole parameters as they stand on the ranks afterwards go to `gathered.safetensors`."""
    summary = train._summary

    def gathering(session: Session, *rest: Any) -> dict[str, Any]:
        whole = {}
        for name, parameter in session.model.model.named_parameters():
            with zero3.gather([parameter]):
                whole[name] = parameter.detach().clone()
        if comm.rank() == 0:
            save_file(whole, run.path / GATHERED)
        return summary(session, *rest)

    train._summary = gathering
    try:
        train.run(recipe, run)
    finally:
        train._summary = summary


class _Nudging(Loop):
    """Changes one frozen weight on the last rank by the smallest step there is."""

    def run(self) -> Outcome:
        outcome = super().run()
        if comm.rank() == comm.world_size() - 1:
            parameter = next(p for p in self.session.model.parameters() if not p.requires_grad)
            shard = parameter.ds_tensor.data.view(-1)  # type: ignore[attr-defined]
            shard[-1] = torch.nextafter(shard[-1], torch.tensor(torch.inf))
        return outcome


def train_and_nudge(recipe: Recipe, run: RunDirectory) -> None:
    """Stage train with a defect: a frozen weight changes."""
    train.Loop = _Nudging
    try:
        train.run(recipe, run)
    finally:
        train.Loop = Loop


def watch_groups(recipe: Recipe, run: RunDirectory) -> None:
    """Train; note after every step which groups changed on this rank, in weights or in optimizer state."""
    session, data = open_session(recipe, run), PreparedData.load(run, recipe)
    loop = Loop(session, data, Journal(run.metrics, None, 1), lambda step: None)
    notes = []
    before = _states(session)
    for step in range(recipe.train.steps):
        batch = loop.plan.batch(step)
        present = [recipe.data.pairs[i] for i in sorted(set(batch.pair_ids.tolist()))]
        loop._step(step, 0.0)
        after = _states(session)
        changed = [group for group in after if not _equal(before[group], after[group])]
        notes.append(
            {
                "present": present,
                "active": sorted(active_groups(after, present)),
                "changed": sorted({group for part in comm.gather_objects(changed) for group in part}),
                "groups": sorted(after),
            }
        )
        before = after
    if comm.rank() == 0:
        (run.path / WATCHED).write_text(json.dumps(notes))
    session.engine.destroy()


def look_into_session(recipe: Recipe, run: RunDirectory) -> None:
    """Note types of parameters and buffers, and validation losses of all pairs, of one alone and of few sentences."""
    session, data = open_session(recipe, run), PreparedData.load(run, recipe)
    valid = dict(enumerate(data.split("valid").values()))
    few = replace(session, recipe=replace(recipe, train=replace(recipe.train, valid_examples=1)))
    notes = {
        "parameters": sorted({str(p.dtype) for p in session.model.parameters()}),
        "rotary": sorted({str(b.dtype) for name, b in session.model.named_buffers() if "inv_freq" in name}),
        "all": validation_loss(session, valid),
        "one": validation_loss(session, {2: valid[2]}),
        # One sentence: most micro-batches and perhaps ranks have none.
        "few": validation_loss(few, {2: valid[2]}),
        "training": session.model.training,
    }
    if comm.rank() == 0:
        (run.path / NOTES).write_text(json.dumps(notes))
    session.engine.destroy()


def use_collectives(recipe: Recipe, run: RunDirectory) -> None:
    """Note what every collective returns on every rank."""
    rank, ranks = comm.rank(), comm.world_size()
    summed = torch.full((2,), float(rank + 1), dtype=torch.float64)
    returned = comm.sum_over_ranks(summed)
    notes = {
        "sum": summed.tolist(),
        "same": returned is summed,
        "gathered": comm.gather_objects({"rank": rank}),
        "from_zero": comm.from_rank_zero(f"of rank {rank}"),
        "share": list(comm.share(range(10))),
    }
    (run.path / f"{rank}-{NOTES}").write_text(json.dumps(notes))
    comm.barrier()
    assert all((run.path / f"{other}-{NOTES}").exists() for other in range(ranks))


def diverge(recipe: Recipe, run: RunDirectory) -> None:
    """Stage train, which must fail; every rank notes the error."""
    try:
        train.run(recipe, run)
    except LanderError as error:
        (run.path / f"{comm.rank()}-{NOTES}").write_text(str(error))


def _states(session: Session) -> dict[str, list[torch.Tensor]]:
    """This rank's float32 masters and optimizer state by group."""
    zero = session.engine.optimizer
    names = [group["name"] for group in zero.optimizer.param_groups]
    found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for number, part in enumerate(zero.fp32_partitioned_groups_flat):
        held = found[names[zero.sub_group_to_group_id[number]]]
        held.append(part.detach().clone())
        held += [torch.as_tensor(value).clone() for value in zero.optimizer.state[part].values()]
    return found


def _equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
