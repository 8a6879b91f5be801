"""How a stage runs: whether it is up to date, its clock, its record, and the ranks that wait."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lander_ds.common.errors import ArtefactError
from lander_ds.common.files import write_text
from lander_ds.common.lock import locked
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.loading import dump_recipe
from lander_ds.config.recipe import Recipe
from lander_ds.distributed import collectives, process_group
from lander_ds.distributed.start import Start
from lander_ds.stages.catalogue import STAGES

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What the body of a part leaves."""

    outputs: Sequence[Path]
    """Files or directories it wrote."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """JSON values that its record keeps as well, e.g. counts."""


@dataclass(frozen=True)
class Part:
    """What has one record, `stages/RECORD.json`. Most stages have one part; `translate` has one per system."""

    record: str
    options: Mapping[str, Any]
    """Everything in the recipe that the result depends on."""
    inputs: Mapping[str, str]
    """What is read: name -> content hash."""
    body: Callable[[], Result]
    """Does the work; called only when the part is not up to date."""
    usable: Callable[[], bool] = lambda: True
    """Whether outputs that the record does not list are still there."""
    show: Callable[[], None] = lambda: None
    """Tells the user of the result, whether it is new or not."""
    prepare: Callable[[], object] = lambda: None
    """Raises what the user has to be told before any part of the stage begins; called when this one is not up to date."""


@contextmanager
def alone(path: Path, what: str, collective: bool) -> Iterator[None]:
    """Hold a lock that rank 0 takes for all ranks: two at the same work in one run directory would end in a mixture.

    Args:
        path: the lock file.
        what: what it protects, for messages.
        collective: whether all ranks call this.

    Raises:
        ArtefactError: another process is at it.
    """
    refusal = None
    with ExitStack() as lock:
        if process_group.rank() == 0:
            try:
                lock.enter_context(locked(path, what))
            except ArtefactError as error:
                refusal = str(error)
        if collective:
            refusal = collectives.from_rank_zero(refusal)
        if refusal is not None:
            raise ArtefactError(refusal)
        yield


class Stage:
    """One stage of a recipe."""

    def __init__(self, name: str, parts: Callable[[Start], Sequence[Part]]) -> None:
        """Declare a stage.

        Args:
            name: its key in the catalogue.
            parts: what it consists of, in order; raises what the user has to be told before any work.
        """
        self.description = STAGES[name]
        self._parts = parts

    def run(self, recipe: Recipe, run: RunDirectory, force: bool = False, auto_resume: bool = False) -> None:
        """Run this stage alone (collective). Raises what its module says."""
        self.perform(Start(recipe, run, force, auto_resume))

    def perform(self, start: Start) -> None:
        """Run every part that is not up to date and record it, with the recipe beside it (collective).

        Raises:
            ArtefactError: another process runs this stage in the same run directory.
        """
        collective = self.description.collective
        if collective or process_group.rank() == 0:
            # To find out what there is to do takes time too: large corpora are hashed.
            started = time.monotonic()
            name, lock, run = self.description.name, self.description.lock, start.run.path
            with alone(run / f".{lock}.lock", f"stage {name} in {run}", collective):
                if process_group.rank() == 0:
                    write_text(start.run.recipe, dump_recipe(start.recipe))
                parts = self._parts(start)
                current = self._current(start, parts)
                for part in parts:
                    if part.record not in current:
                        part.prepare()
                for part in parts:
                    self._perform(start, part, part.record in current, started)
                    if collective:
                        collectives.barrier()
                    started = time.monotonic()
        if not collective:
            process_group.wait_for_rank_zero()

    def _current(self, start: Start, parts: Sequence[Part]) -> list[str]:
        """Records of the parts that are up to date; rank 0 looks, for all ranks."""
        looks = process_group.rank() == 0
        current = [part.record for part in parts if looks and self._is_up_to_date(start, part)]
        return collectives.from_rank_zero(current) if self.description.collective else current

    def _perform(self, start: Start, part: Part, current: bool, started: float) -> None:
        if current:
            logger.info("%s: up to date", part.record.replace(".", " "))
        else:
            result = part.body()
            if process_group.rank() == 0:
                seconds = time.monotonic() - started
                start.run.record(
                    part.record, part.options, part.inputs, result.outputs, seconds, result.figures
                )
        part.show()

    @staticmethod
    def _is_up_to_date(start: Start, part: Part) -> bool:
        return (
            not start.force and start.run.up_to_date(part.record, part.options, part.inputs) and part.usable()
        )
