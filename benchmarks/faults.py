#!/usr/bin/env python
"""Is anything lost? A training on two ranks is killed again and again, and hurt in other ways, and goes on each time.

It is killed with SIGKILL (one rank or all) at random moments of its start and its steps, and inside saves. Every time
it is resumed with --auto-resume. In the end weights, optimizer state and metrics must equal those of an uninterrupted
training bitwise. docs/checkpoints.md says what the faults are and what is expected of each.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import processor  # noqa: F401 - before DeepSpeed is imported
from injected import FAULTS, Scene
from miniature import (
    RANKS,
    Forked,
    Launched,
    Miniature,
    Training,
    Unexpected,
    arguments,
    being_saved,
    differences,
    last_step,
    make_miniature,
    whole,
)

from lander_ds.checkpoint import checkpoint
from lander_ds.common.errors import LanderError
from lander_ds.common.run_directory import RunDirectory

WIDTH, NEURONS = 64, 1024
"""Of the model: its checkpoints have 5 MB and take some 50 ms to write."""
KEEP_LAST, KEEP_EVERY = 3, 30
STEPS_PER_KILL = 4
"""How far the training comes between kills."""
SPARE_STEPS = 24
"""Saves are short, and some pass before one is hit."""
START_SECONDS, SAVE_SECONDS = 2.0, 0.08
"""About how long the start of a training and a save take, in which kills are spread."""
KINDS = {"start": 0.15, "step": 0.35, "save": 0.5}
"""Share of the kills by where they hit."""


@dataclass
class Tally:
    """What the kills did."""

    kills: Counter[str] = field(default_factory=Counter)
    """By kind of moment."""
    inside_save: int = 0
    """A checkpoint was being written when the signal was sent."""
    lost: list[str] = field(default_factory=list)
    """Checkpoints that were there before a kill, and afterwards were damaged, or gone without being superfluous."""
    half_read: list[str] = field(default_factory=list)
    """Starts that went on from something else than the newest whole checkpoint."""


class Killing:
    """One training, killed and resumed until enough kills are done, and then left in peace."""

    def __init__(self, made: Miniature, kills: int, launched: int, seed: int, logs: Path) -> None:
        """Prepare.

        Args:
            made: what is trained.
            kills: how many.
            launched: so many of them under DeepSpeed's launcher, the others in forked processes.
            seed: of the random moments and ranks.
            logs: an output file per start is written there.
        """
        self.made, self.kills, self.logs = made, kills, logs
        self.random = random.Random(seed)
        self.steps = STEPS_PER_KILL * (kills + 1) + SPARE_STEPS
        self.kinds = [kind for kind, share in KINDS.items() for _ in range(round(share * kills))]
        self.kinds = (self.kinds + ["save"] * kills)[:kills]
        self.random.shuffle(self.kinds)
        self.launched = set(self.random.sample(range(kills), min(launched, kills)))
        self.tally = Tally()
        self._present: list[int] = []

    def uninterrupted(self) -> RunDirectory:
        """The same training in peace."""
        run = self.made.run("uninterrupted")
        self._start(run, "uninterrupted").expect(0)
        return run

    def run(self) -> RunDirectory:
        """Kill and resume."""
        run = self.made.run("killed")
        for number, kind in enumerate(self.kinds):
            before = whole(run)
            training = self._start(run, f"kill-{number:03}", number in self.launched)
            try:
                moment = self._kill(training, run, kind, number)
                training.wait()
            finally:
                training.stop()
            self._look(run, training, before)
            say(
                f"kill {number + 1} of {self.kills}: {moment}; whole: {', '.join(map(str, whole(run))) or 'none'}"
            )
        before = whole(run)
        training = self._start(run, "last").expect(0)
        self._look(run, training, before)
        return run

    def _start(self, run: RunDirectory, name: str, launched: bool = False) -> Training:
        options = arguments(
            self.made,
            run,
            "select.layers.k=2",
            "train.batch_tokens=192",
            "train.lr={general: 1.0e-3, specific: 1.0e-3, gates: 1.0e-3}",
            "routing.alpha_max=1.0",
            "routing.budget_weight=0.3",
            "train.clip=0.2",
            "train.valid_every=10",
            "train.valid_examples=4",
            "train.save_every=3",
            f"train.keep_last={KEEP_LAST}",
            f"train.keep_every={KEEP_EVERY}",
            f"train.steps={self.steps}",
        )
        log = self.logs / f"{name}.log"
        return (Launched if launched else Forked)([*options, "--auto-resume"], log)

    def _kill(self, training: Training, run: RunDirectory, kind: str, number: int) -> str:
        """Kill some ranks at a moment of a kind; returns what was done."""
        victims = self.random.choice([(0,), (1,), (0, 1)])
        if kind == "start":
            training.until(lambda: bool(training.pids()), "processes")
            time.sleep(self.random.uniform(0.0, START_SECONDS))
        else:
            # Never further than this, so that there is something left for the kills to come.
            target = number * STEPS_PER_KILL + self.random.randint(1, STEPS_PER_KILL)
            training.until(lambda: last_step(run) >= target, f"step {target}")
            if kind == "step":
                time.sleep(self.random.uniform(0.0, 0.5))
        saving: list[str] = []
        reach = SAVE_SECONDS
        # Where saves are too short to be hit, the training must not come to its end meanwhile.
        limit = min((number + 1) * STEPS_PER_KILL + SPARE_STEPS // 2, self.steps - STEPS_PER_KILL)
        while True:
            if kind == "save":
                training.until(lambda: bool(being_saved(run)) or last_step(run) >= limit, "a save")
                time.sleep(self.random.uniform(0.0, reach))
                # Came too late, perhaps: saves may be shorter here.
                reach /= 2
            # All stand still while the driver looks at what is there.
            training.signal(signal.SIGSTOP, range(RANKS))
            saving, self._present = being_saved(run), checkpoint.steps(run.checkpoints)
            if kind == "save" and not saving and last_step(run) >= limit:
                kind = "step"
            if saving or kind != "save":
                break
            training.signal(signal.SIGCONT, range(RANKS))
        training.signal(signal.SIGKILL, victims)
        training.signal(signal.SIGCONT, set(range(RANKS)) - set(victims))
        self.tally.kills[kind] += 1
        self.tally.inside_save += bool(saving)
        how = "launched" if isinstance(training, Launched) else "forked"
        inside = f" inside the save of {saving[0][1:].partition('.')[0]}" if saving else ""
        return f"{how}, {kind}, rank {' and '.join(map(str, victims))} at step {last_step(run)}{inside}"

    def _look(self, run: RunDirectory, training: Training, before: dict[int, str]) -> None:
        """Compare the checkpoints with those before, and from where the training went on with where it should."""
        after = whole(run)
        for step in {*before, *self._present}:
            newer = [other for other in after if other > step]
            deleted = step not in checkpoint.steps(run.checkpoints)
            superfluous = deleted and len(newer) >= KEEP_LAST and step % KEEP_EVERY != 0
            if step in after:
                if before.get(step, after[step]) != after[step]:
                    self.tally.lost.append(f"{training.log.stem}: step-{step} has changed")
            elif not superfluous:
                self.tally.lost.append(f"{training.log.stem}: step-{step} is gone or damaged")
        self._present = []
        told = training.line("going on from ")
        came_from = int(told.rpartition("step-")[2]) if told else 0
        newest = max(before, default=0)
        if "looking for an earlier one" in training.text() or (told and came_from != newest):
            self.tally.half_read.append(f"{training.log.stem}: {told!r} instead of step-{newest}")


def say(text: str) -> None:
    """Progress, on standard error."""
    print(f"faults: {text}", file=sys.stderr, flush=True)


def inject(made: Miniature, names: list[str], directory: Path) -> list[dict[str, str]]:
    """Do the named faults one after the other; the outcome of one that goes wrong begins with UNEXPECTED."""
    scene = Scene(made, directory)
    found = []
    for name in names:
        began = time.monotonic()
        try:
            outcome = FAULTS[name](scene)
        except (Unexpected, LanderError) as error:
            outcome = f"UNEXPECTED: {error}"
        finally:
            scene.clear()
        found.append({"fault": name, "outcome": outcome})
        say(f"{name} ({time.monotonic() - began:.0f} s): {outcome}")
    return found


def measure(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Everything; the result has the keys of the JSON."""
    made = make_miniature(directory / "made", WIDTH, NEURONS)
    logs = directory / "logs"
    logs.mkdir()
    killing = Killing(made, options.kills, options.launched, options.seed, logs)
    expected = killing.uninterrupted()
    found = differences(killing.run(), expected)
    tally = killing.tally
    for text in (*tally.lost, *tally.half_read, *found):
        say(f"UNEXPECTED: {text}")
    say(
        f"kills: {dict(tally.kills)}, {tally.inside_save} inside a save; {', '.join(found) or 'nothing'} differs"
    )
    return {
        "kills": tally.kills.total(),
        "kills_inside_save": tally.inside_save,
        "checkpoints_lost": len(tally.lost),
        "half_read": len(tally.half_read),
        "final_weights_bitwise_equal": not found,
        "injected_faults": inject(made, options.faults, directory),
    }


def is_good(result: dict[str, Any]) -> bool:
    """Whether nothing was lost."""
    return (
        result["checkpoints_lost"] == result["half_read"] == 0
        and result["final_weights_bitwise_equal"]
        and not any(entry["outcome"].startswith("UNEXPECTED") for entry in result["injected_faults"])
    )


def table(result: dict[str, Any]) -> str:
    """The result for a person."""
    lines = [f"{key:<28}{value}" for key, value in result.items() if key != "injected_faults"]
    return "\n".join(
        [*lines, "", *(f"{entry['fault']}\n    {entry['outcome']}" for entry in result["injected_faults"])]
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--kills", default=50, type=int, help="how often the training is killed (%(default)s)")
    add("--launched", default=6, type=int, help="so many of them under DeepSpeed's launcher (%(default)s)")
    add("--seed", default=0, type=int, help="of the moments and ranks (%(default)s)")
    add(
        "--faults",
        default="all",
        help=f"all, none, or with commas some of: {', '.join(FAULTS)} (%(default)s)",
    )
    add("--keep", type=Path, help="work in this new directory and leave it, with the output of every start")
    add("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    names = {"all": list(FAULTS), "none": []}.get(options.faults, options.faults.split(","))
    if unknown := set(names) - set(FAULTS):
        parser.error(f"--faults: unknown {', '.join(sorted(unknown))}; there are {', '.join(FAULTS)}")
    if options.kills < 1:
        parser.error("--kills must be at least 1")
    options.faults = names
    return options


def set_environment() -> None:
    """Set what the ranks inherit: one thread each, no GPU, no network."""
    os.environ.update(OMP_NUM_THREADS="1")
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", COLUMNS="300")
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


def main() -> int:
    """Run; returns the exit code: 1 when something was lost or a fault ended otherwise than it should."""
    options = parse()
    set_environment()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if options.keep is not None:
            options.keep.mkdir(parents=True)
            result = measure(options, options.keep.resolve())
        else:
            with tempfile.TemporaryDirectory(prefix="lander-faults-") as directory:
                result = measure(options, Path(directory))
    except (Unexpected, LanderError) as error:
        say(f"error: {error}")
        return 1
    print(json.dumps(result, indent=2) if options.json else table(result))
    return 0 if is_good(result) else 1


if __name__ == "__main__":
    sys.exit(main())
