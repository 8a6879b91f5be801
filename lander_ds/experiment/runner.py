"""Running an experiment: what all cells share first, then every cell that is not finished, one per slot.

Each cell is a process of its own, `lander all --stages ...`, so that it begins, fails and resumes like any run.
"""

from __future__ import annotations

import logging
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import IO

from lander_ds.common.errors import ExitCode, LanderError
from lander_ds.common.files import read_json, write_json
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.loading import load_recipe
from lander_ds.config.recipe import Recipe
from lander_ds.experiment.grid import Cell, Experiment, Kind, cells, overrides, trials
from lander_ds.experiment.outcome import cell_file, publish
from lander_ds.experiment.results import chosen_rates, step_seconds
from lander_ds.preflight.recipe import load_checked
from lander_ds.training.preemption import Preempted, StopRequest
from lander_ds.training.session import METHODS_WITH_SELECTION

logger = logging.getLogger(__name__)

FIRST_PORT = 29600
POLL_SECONDS = 0.5

START_FILE = "start.json"
"""In a cell's run directory: what was decided when it was first started."""


class CellsFailed(LanderError):
    """Some cells could not be run; the others are finished."""

    exit_code = ExitCode.DEFECT


@dataclass
class _Running:
    cell: Cell
    slot: int
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    started: float


class Runner:
    """Brings an experiment to its end, over as many starts as it takes."""

    def __init__(
        self, experiment: Experiment, recipe: Path, slots: int = 1, only: Sequence[str] = ()
    ) -> None:
        """Prepare.

        Args:
            experiment: what to run.
            recipe: its recipe's file.
            slots: cells that run at the same time.
            only: patterns (`fnmatch`) of names of cells; empty: all. Trials that they need are run as well.
        """
        self.experiment, self.recipe, self.slots, self.only = experiment, recipe, slots, only
        self.path = Path(experiment.run_dir)
        self.out = self.path / "results" if experiment.results is None else Path(experiment.results)
        self.cache = self.path / "cache"

    def is_finished(self, cell: Cell) -> bool:
        """Whether the figures of a cell are among the results."""
        return cell_file(self.out, cell).exists()

    def directory(self, cell: Cell) -> Path:
        """The run directory of a cell."""
        return self.path / cell.name

    def recipe_of(self, cell: Cell) -> Recipe:
        """The recipe of a cell.

        Raises:
            ConfigError: settings of the experiment do not fit the recipe.
        """
        return load_recipe(self.recipe, self._overrides(cell))

    def _overrides(self, cell: Cell) -> list[str]:
        return overrides(self.experiment, cell, self.directory(cell), self.cache)

    def run(self) -> None:
        """Run everything that is not finished.

        Raises:
            CellsFailed: with the log of each cell that failed.
            Preempted: a signal asked to stop; cells that were running have saved what they had.
            ConfigError: settings of the experiment do not fit the recipe.
        """
        plan = self.plan()
        for cell in {(cell.method, cell.variant, cell.kind): cell for cell in plan}.values():
            load_checked(self.recipe, self._overrides(cell), self._stages(cell))
        for variant in self.experiment.variant_names:
            self._share(variant, [cell for cell in plan if cell.variant == variant])
        first = self._trials()
        failed = self._run_all(first, more=len(plan) - len(first))
        rates = chosen_rates(self.experiment, self.out)
        # Runs at equal steps tell how long a step takes, and with that how many fit into equal time.
        failed += self._run_all(self._ready("steps", rates), more=len(self._comparison("time", rates)))
        failed += self._run_all(self._ready("time", rates))
        if failed:
            listing = "\n".join(f"  {self.directory(cell) / 'log'}" for cell in failed)
            raise CellsFailed(
                f"{len(failed)} cells failed; start again to retry them. Their logs:\n{listing}"
            )

    def _ready(self, kind: Kind, rates: Mapping[tuple[str, str], float | None]) -> list[Cell]:
        """The cells of a comparison whose learning rate and steps are known; they are not where what tells them failed."""
        ready = []
        for cell in self._comparison(kind, rates):
            tuned = cell.rate is not None or not self.experiment.methods[cell.method].rate_keys
            if tuned and (kind == "steps" or self._steps_in_time(cell) is not None):
                ready.append(cell)
            else:
                logger.warning("%s: left out, because runs that it depends on are not finished", cell.name)
        return ready

    def plan(self) -> list[Cell]:
        """Every cell that is to be run, in order."""
        return [*self._trials(), *self._comparison("steps", {}), *self._comparison("time", {})]

    def _trials(self) -> list[Cell]:
        """Those that the wanted cells need."""
        wanted = (*self._comparison("steps", {}), *self._comparison("time", {}))
        needed = {self.experiment.methods[cell.method].tuned_as or cell.method for cell in wanted}
        return [cell for cell in trials(self.experiment) if cell.method in needed]

    def _comparison(self, kind: Kind, rates: Mapping[tuple[str, str], float | None]) -> list[Cell]:
        """The wanted cells of a comparison; at equal time without those whose steps hardly differ from the baseline's."""
        if kind == "time" and not self.experiment.equal_time:
            return []
        return [
            cell
            for cell in cells(self.experiment, kind, rates)
            if not self.only or any(fnmatch(cell.name, pattern) for pattern in self.only)
            if kind == "steps" or self._steps_in_time(cell) != 0
        ]

    def _steps_in_time(self, cell: Cell) -> int | None:
        """Steps that a method takes while the baseline takes those of the recipe; None while that is not known, 0 where
        the two hardly differ."""
        times = step_seconds(self.experiment, self.out)
        mine, its = (times.get((name, cell.variant)) for name in (cell.method, self.experiment.baseline))
        if mine is None or its is None:
            return None
        steps = self.recipe_of(cell).train.steps
        return 0 if abs(its / mine - 1) < 0.05 else max(1, round(steps * its / mine))

    def _share(self, variant: str, members: Sequence[Cell]) -> None:
        """Run prepare and detect once per variant, where a cell needs them."""
        if all(self.is_finished(cell) for cell in members):
            return
        detects = [cell for cell in members if self._selects(cell)]
        model = replace((detects or list(members))[0], kind="steps", seed=self.experiment.seeds[0])
        shared = self.path / "shared" / variant
        settings = overrides(self.experiment, model, shared, self.cache)
        stages = "prepare,detect" if detects else "prepare"
        command = self._command(["all", "--stages", stages], settings, slot=0)
        log = shared / "log"
        log.parent.mkdir(parents=True, exist_ok=True)
        logger.info("%s: %s for all cells", variant, stages)
        with log.open("ab") as stream:
            code = subprocess.run(command, stdout=stream, stderr=stream, check=False).returncode
        if code != ExitCode.DONE:
            raise CellsFailed(f"{stages} for all cells failed with exit code {code}; the log is {log}")

    def _command(self, stage: Sequence[str], settings: Sequence[str], slot: int) -> list[str]:
        text = self.experiment.launch.format(slot=slot, port=FIRST_PORT + slot)
        words = shlex.split(text)
        if words[0] == "lander":
            words = [sys.executable, "-m", "lander_ds", *words[1:]]
        command = [*words, *stage, "--recipe", str(self.recipe)]
        for setting in settings:
            command += ["--set", setting]
        return command

    def _run_all(self, members: Sequence[Cell], more: int = 0) -> list[Cell]:
        """Run cells in order, `slots` at a time; returns those that failed.

        Args:
            members: the cells.
            more: how many are still to come after these, for the estimate of time left.
        """
        queue = deque(cell for cell in members if not self.is_finished(cell))
        running: list[_Running] = []
        failed: list[Cell] = []
        seconds: list[float] = []
        with StopRequest() as stop:
            try:
                while queue or running:
                    if stop.received:
                        raise Preempted("asked to stop: the cells that were running go on at the next start")
                    free = set(range(self.slots)) - {one.slot for one in running}
                    while queue and free:
                        cell = queue.popleft()
                        if not self.is_finished(cell):  # by another runner of the same grid, meanwhile
                            running.append(self._start(cell, free.pop()))
                    time.sleep(POLL_SECONDS)
                    for one in [one for one in running if one.process.poll() is not None]:
                        running.remove(one)
                        one.log.close()
                        seconds.append(time.monotonic() - one.started)
                        self._finish(one, seconds[-1], failed)
                        self._announce(len(queue) + len(running) + more, seconds)
            finally:
                for one in running:
                    one.process.send_signal(signal.SIGTERM)
                for one in running:
                    one.process.wait()
                    one.log.close()
        return failed

    def _announce(self, left: int, seconds: Sequence[float]) -> None:
        minutes = left * sum(seconds) / len(seconds) / self.slots / 60
        logger.info("%d cells left, about %.0f minutes", left, minutes)

    def _start(self, cell: Cell, slot: int) -> _Running:
        directory = self.directory(cell)
        cell = self._decided(cell)
        self._lend(directory, cell.variant)
        settings = self._overrides(cell)
        stages = self._stages(cell)
        log = (directory / "log").open("ab")
        logger.info("%s: started", cell.name)
        command = self._command(["all", "--stages", ",".join(stages), "--auto-resume"], settings, slot)
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        return _Running(cell, slot, process, log, time.monotonic())

    def _stages(self, cell: Cell) -> list[str]:
        """What a cell runs."""
        if not self.experiment.methods[cell.method].trained:
            return ["prepare", "translate", "score"]
        selection = ("detect", "select") if self._selects(cell) else ()
        return ["prepare", *selection, "train", "translate", "score"]

    def _selects(self, cell: Cell) -> bool:
        """Whether a cell trains what a selection has picked."""
        trained = self.experiment.methods[cell.method].trained
        return trained and self.recipe_of(cell).train.method in METHODS_WITH_SELECTION

    def _decided(self, cell: Cell) -> Cell:
        """The cell with its learning rate and steps, which stay what they were when it was first started."""
        path = self.directory(cell) / START_FILE
        if path.exists():
            return replace(cell, **read_json(path, "delete the cell's directory"))
        if cell.kind == "time":
            cell = replace(cell, steps=self._steps_in_time(cell))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"rate": cell.rate, "steps": cell.steps})
        return cell

    def _lend(self, directory: Path, variant: str) -> None:
        """Give a cell the detection that all share."""
        shared, own = RunDirectory(self.path / "shared" / variant), RunDirectory(directory)
        for source, target in (
            (shared.awareness, own.awareness),
            (shared.record_path("detect"), own.record_path("detect")),
        ):
            if source.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)

    def _finish(self, one: _Running, seconds: float, failed: list[Cell]) -> None:
        directory, code = self.directory(one.cell), one.process.returncode
        if code != ExitCode.DONE:
            logger.error("%s: exit code %d, see %s", one.cell.name, code, directory / "log")
            failed.append(one.cell)
            return
        publish(one.cell, directory, self.out, seconds)
        if one.cell.kind == "trial":
            shutil.rmtree(RunDirectory(directory).checkpoints, ignore_errors=True)
        logger.info("%s: finished in %.0f s", one.cell.name, seconds)
