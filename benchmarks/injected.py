"""The faults besides SIGKILL: each is done to a training of its own, and what comes of it is compared and told."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import psutil
from hooks import SKIPPED
from miniature import (
    Forked,
    Launched,
    Miniature,
    Training,
    Unexpected,
    arguments,
    expect_same,
    last_step,
    other_base,
    whole,
)

from lander_ds.checkpoint import checkpoint
from lander_ds.common.errors import ExitCode
from lander_ds.common.run_directory import RunDirectory
from lander_ds.training.preemption import Preempted

STEPS, SAVE_EVERY = 12, 4
OPTIONS = (
    "select.layers.k=2",
    "train.batch_tokens=192",
    "train.lr={general: 1.0e-3, specific: 1.0e-3, gates: 1.0e-3}",
    f"train.save_every={SAVE_EVERY}",
    f"train.steps={STEPS}",
)
STALL_SECONDS, STALL_SECONDS_LAUNCHED = 6.0, 40.0
"""Longer than a start takes, which counts too."""
WRONG, FAILED_SAVE, KILLED = ExitCode.WRONG_INPUT, ExitCode.NOT_SAVED, -signal.SIGKILL
"""Exit codes."""


@dataclass
class Scene:
    """Where faults happen."""

    built: Miniature
    directory: Path
    trainings: list[Training] = field(default_factory=list)
    mounts: list[Path] = field(default_factory=list)

    @cached_property
    def expected(self) -> RunDirectory:
        """A training that nothing happens to; checkpoints every 4 steps, 12 in all."""
        run = self.built.run("in-peace")
        self.start(run).expect(0)
        return run

    def begun(self, name: str) -> RunDirectory:
        """A training that was ended after step 8, with checkpoints of steps 4 and 8."""
        run = self.built.run(name)
        for step in (4, 8):
            shutil.copytree(self.expected.checkpoints / f"step-{step}", run.checkpoints / f"step-{step}")
        shutil.copy(self.expected.metrics, run.metrics)
        return run

    def start(
        self, run: RunDirectory, *overrides: str, hook: str = "", launched: bool = False, resume: bool = True
    ) -> Training:
        """Start a training in `run`; `hook`: a function of hooks.py."""
        options = arguments(self.built, run, *OPTIONS, *overrides)
        options += ["--auto-resume"] if resume else []
        number = len(list(self.directory.glob("fault-*.log")))
        log = self.directory / f"fault-{number:03}-{run.path.name}.log"
        training = Launched(options, log) if launched else Forked(options, log, hook and f"hooks:{hook}")
        self.trainings.append(training)
        return training

    def goes_on(self, run: RunDirectory, *overrides: str) -> Training:
        """Resume, and compare the end with the training in peace.

        Raises:
            Unexpected: it fails, or is not bitwise equal.
        """
        training = self.start(run, *overrides).expect(0)
        expect_same(run, self.expected)
        return training

    def clear(self) -> None:
        """End what is left of a fault."""
        for training in self.trainings:
            training.stop()
        for path in self.mounts:
            subprocess.run(["umount", str(path)], check=True)
        self.trainings, self.mounts = [], []


def preempted(scene: Scene, number: signal.Signals, ranks: tuple[int, ...], launched: bool) -> str:
    """A signal to ranks during training."""
    run = scene.built.run(f"{number.name}-{'launched' if launched else 'forked'}")
    training = scene.start(run, launched=launched)
    training.until(lambda: last_step(run) >= 2, "step 2")
    training.signal(number, ranks)
    training.expect(Preempted.exit_code, "asked to stop")
    step = last_step(run)
    if max(whole(run), default=0) != step:
        raise Unexpected(f"stopped at step {step}, but whole are {list(whole(run))}")
    scene.goes_on(run)
    who = " and ".join(map(str, ranks))
    return f"rank {who} got it: step {step} was saved, exit code {Preempted.exit_code}; resumed, bitwise equal in the end"


def signalled_twice(scene: Scene) -> str:
    """A second SIGTERM comes while the checkpoint after the first one is being written."""
    run = scene.built.run("signalled-twice")
    training = scene.start(run, "train.save_every=0", hook="signal_while_saving")
    training.until(lambda: last_step(run) >= 2, "step 2")
    training.signal(signal.SIGTERM, (0, 1))
    training.expect(Preempted.exit_code, "asked to stop")
    step = last_step(run)
    if max(whole(run), default=0) != step:
        raise Unexpected(f"stopped at step {step}, but whole are {list(whole(run))}")
    return f"step {step} was saved all the same, exit code {Preempted.exit_code}"


def launcher_terminated(scene: Scene) -> str:
    """SIGTERM to DeepSpeed's launcher and its children, as container managers send it."""
    run = scene.built.run("launcher-terminated")
    training = scene.start(run, launched=True)
    assert isinstance(training, Launched)
    training.until(lambda: last_step(run) >= 2, "step 2")
    os.killpg(training.launcher.pid, signal.SIGTERM)
    training.wait()
    step = last_step(run)
    if max(whole(run), default=0) != step:
        raise Unexpected(f"stopped at step {step}, but whole are {list(whole(run))}:\n{training.tail()}")
    scene.goes_on(run)
    return f"step {step} was saved; the launcher itself ended with {training.code()}; resumed, bitwise equal in the end"


NOT_ROOT = "skipped: mounting a file system of limited size needs root"


def _on_a_small_disk(scene: Scene, run: RunDirectory, size: int) -> Training | None:
    """Start a training on a file system of its own; None where that is not allowed."""
    run.path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(run.path)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        return None
    scene.mounts.append(run.path)
    shutil.copytree(scene.built.root / "prepared" / "data", run.data)
    scene.built.selection().save(run.selection)
    return scene.start(run)


def full_disk(scene: Scene) -> str:
    """The whole run directory lies on a file system that has room for one checkpoint and a half."""
    size = sum(file.stat().st_size for file in (scene.expected.checkpoints / "step-4").iterdir())
    run = RunDirectory(scene.built.root / "full-disk")
    training = _on_a_small_disk(scene, run, 3 * size // 2 + (1 << 20))
    if training is None:
        return NOT_ROOT
    training.expect(FAILED_SAVE, "could not be written", "No space left on device")
    if list(whole(run)) != [4]:
        raise Unexpected(f"whole are {list(whole(run))}, not step 4 alone:\n{training.tail()}")
    wording = training.line("error: checkpoint")
    subprocess.run(["mount", "-o", f"remount,size={10 * size}", str(run.path)], check=True)
    scene.goes_on(run)
    return (
        f"steps 8 and 12 could not be saved, training went on, exit code {FAILED_SAVE}, step 4 whole: {wording!r}; with "
        "more room resumed from step 4, bitwise equal in the end"
    )


def no_room_at_all(scene: Scene) -> str:
    """Something else fills the file system to its last byte during training."""
    run = RunDirectory(scene.built.root / "no-room")
    training = _on_a_small_disk(scene, run, 64 << 20)
    if training is None:
        return NOT_ROOT
    training.until(lambda: last_step(run) >= SAVE_EVERY + 1, f"step {SAVE_EVERY + 1}")
    with (run.path / "filler").open("wb") as stream, suppress(OSError):
        while True:
            stream.write(bytes(1 << 16))
            stream.flush()
    code = training.wait()
    if code != FAILED_SAVE or "No space left on device" not in training.line("error: "):
        raise Unexpected(f"exit code {code}:\n{training.tail()}")
    if SAVE_EVERY not in whole(run):
        raise Unexpected(f"whole are {list(whole(run))}")
    wording = training.line("error: ")
    (run.path / "filler").unlink()
    scene.goes_on(run)
    return f"exit code {code}: {wording!r}; with more room resumed, bitwise equal in the end"


def damaged(scene: Scene, name: str, damage: Callable[[Path], None]) -> str:
    """Something is wrong with a file of the newest checkpoint."""
    run = scene.begun(f"damaged-{name}-{damage.__name__}")
    path = run.checkpoints / "step-8"
    damage(path / name)
    left = {file.name: file.read_bytes() for file in path.iterdir()}
    training = scene.goes_on(run)
    _expect_line(training, "looking for an earlier one")
    _expect_line(training, f"going on from {run.checkpoints / 'step-4'}")
    kept = run.checkpoints / "step-8.replaced-1"
    if not kept.is_dir() or {file.name: file.read_bytes() for file in kept.iterdir()} != left:
        raise Unexpected(f"the damaged step-8 was not kept as {kept.name}")
    return "reported; resumed from step 4, bitwise equal in the end; the damaged checkpoint was kept beside the new one"


def flipped(path: Path) -> None:
    """Change one byte in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncated(path: Path) -> None:
    """Cut off the end."""
    path.write_bytes(path.read_bytes()[:-100])


def missing(path: Path) -> None:
    """Delete."""
    path.unlink()


def all_damaged(scene: Scene) -> str:
    """No checkpoint is whole."""
    run = scene.begun("all-damaged")
    for step in (4, 8):
        flipped(run.checkpoints / f"step-{step}" / "trained-0.safetensors")
    before = sorted(run.checkpoints.rglob("*"))
    wording = scene.start(run).expect(WRONG, "none of the 2 checkpoints").line("error: none of the 2")
    if sorted(run.checkpoints.rglob("*")) != before:
        raise Unexpected("the checkpoints have changed")
    return f"exit code {WRONG}, nothing touched: {wording!r}"


def refused(
    scene: Scene, name: str, *overrides: str, says: str, resume: bool = True, base: bool = True
) -> str:
    """A start that does not fit the checkpoints; `base`: with the base model of then."""
    run = scene.begun(f"refused-{name}")
    before = whole(run)
    with nullcontext() if base else other_base(scene.built):
        wording = scene.start(run, *overrides, resume=resume).expect(WRONG, says).line("error: ")
    if whole(run) != before:
        raise Unexpected("the checkpoints have changed")
    scene.goes_on(run)
    return f"exit code {WRONG}, nothing touched: {wording!r}; the right command went on, bitwise equal in the end"


def stopped_rank(scene: Scene, launched: bool) -> str:
    """SIGSTOP: the rank exists, but does nothing."""
    run = scene.built.run(f"stopped-{'launched' if launched else 'forked'}")
    stall = STALL_SECONDS_LAUNCHED if launched else STALL_SECONDS
    training = scene.start(run, f"train.stall_seconds={stall}", launched=launched)
    training.until(lambda: last_step(run) >= 5, "step 5")
    training.signal(signal.SIGSTOP, [1])
    return _stalled(scene, run, training, stall, "rank 1 does not answer")


def hanging_rank(scene: Scene) -> str:
    """Rank 1 sleeps in Python and never comes back."""
    run = scene.built.run("hanging")
    training = scene.start(run, f"train.stall_seconds={STALL_SECONDS}", hook="hang")
    training.until(lambda: last_step(run) >= 4, "step 4")
    return _stalled(scene, run, training, STALL_SECONDS, "rank 1 on")


def _stalled(scene: Scene, run: RunDirectory, training: Training, stall: float, names: str) -> str:
    began = time.monotonic()
    training.until(lambda: "the job is ended" in training.text(), "the watchdog's verdict")
    seconds = time.monotonic() - began
    training.expect(ExitCode.STALLED, names)
    if "waits in" not in training.line("rank 0 on"):
        raise Unexpected(f"the wrong rank is named:\n{training.tail()}")
    wording = f"{training.line(names)!r}, {training.line('rank 0 on')!r}"
    scene.goes_on(run)
    return (
        f"named after {seconds:.1f} s (stall_seconds={stall:g}), exit code {ExitCode.STALLED}: {wording}; resumed, bitwise "
        "equal in the end"
    )


def bad_gradients(scene: Scene) -> str:
    """Infinite gradients in two steps."""
    run = scene.built.run("bad-gradients")
    training = scene.start(run, "train.max_skipped=2", hook="bad_gradients").expect(0)
    skipped = [json.loads(line).get("skipped") for line in run.metrics.read_text().splitlines()]
    counted = checkpoint.newest(run.checkpoints).state["progress"]["skipped"]
    wording = [training.line(f"step {step} skipped: the gradient") for step in SKIPPED]
    if sum(filter(None, skipped)) != len(SKIPPED) or counted != len(SKIPPED) or not all(wording):
        raise Unexpected(f"{skipped} in metrics.jsonl, {counted} in the checkpoint, told {wording}")
    return f"two steps were skipped, told and counted, training ended well: {wording[0]!r}"


def bad_pair(scene: Scene) -> str:
    """Losses of one pair are not numbers."""
    run = scene.built.run("bad-pair")
    training = scene.start(run, "train.max_skipped=3", hook="bad_pair")
    training.expect(WRONG, "the loss of en-fr is not finite", "after 3 skipped steps")
    return f"exit code {WRONG}: {training.line('error: ')!r}"


def dead_worker(scene: Scene) -> str:
    """A tokenising process of stage prepare is killed."""
    run = RunDirectory(scene.built.root / "dead-worker")
    options = arguments(
        scene.built,
        run,
        "select.layers.k=2",
        "data.workers=2",
        f"data.cache_dir={run.path / 'cache'}",
        stage="prepare",
    )
    done = subprocess.Popen(
        [sys.executable, "-m", "lander_ds", *options],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        workers: list[psutil.Process] = []
        while not workers and done.poll() is None:
            # Its own child is the server that forks them.
            children = psutil.Process(done.pid).children(recursive=True)
            workers = [child for child in children if child.ppid() != done.pid]
            time.sleep(0.01)
        if not workers:
            raise Unexpected("ended without a worker")
        workers[0].kill()
        _, wording = done.communicate(timeout=60)
    finally:
        done.kill()
        done.wait()
    if done.returncode != WRONG or "a tokenising process died" not in wording or "Traceback" in wording:
        raise Unexpected(f"exit code {done.returncode}:\n{wording}")
    if (run.data / "prepared.json").exists():
        raise Unexpected("prepared.json was written")
    line = next(line for line in wording.splitlines() if "a tokenising process died" in line)
    return f"exit code {WRONG}, nothing written: {line!r}"


def _expect_line(training: Training, text: str) -> None:
    if text not in training.text():
        raise Unexpected(f"no {text!r} in the output:\n{training.tail()}")


FILES = (
    "trained-0.safetensors",
    "trained-1.safetensors",
    "optimizer-0.safetensors",
    "optimizer-1.safetensors",
    "selection.safetensors",
    "state.json",
)

FAULTS: dict[str, Callable[[Scene], str]] = {
    "SIGTERM to one rank": partial(preempted, number=signal.SIGTERM, ranks=(1,), launched=False),
    "SIGUSR1 to all ranks": partial(preempted, number=signal.SIGUSR1, ranks=(0, 1), launched=False),
    "SIGUSR1 to one rank under deepspeed": partial(
        preempted, number=signal.SIGUSR1, ranks=(0,), launched=True
    ),
    "a second SIGTERM during the save": signalled_twice,
    "SIGTERM to deepspeed": launcher_terminated,
    "full disk": full_disk,
    "a disk without any room": no_room_at_all,
    **{f"a flipped byte in {name}": partial(damaged, name=name, damage=flipped) for name in FILES},
    "a truncated shard": partial(damaged, name=FILES[1], damage=truncated),
    "a truncated state.json": partial(damaged, name=FILES[5], damage=truncated),
    "a missing shard": partial(damaged, name=FILES[2], damage=missing),
    "a missing state.json": partial(damaged, name=FILES[5], damage=missing),
    "every checkpoint damaged": all_damaged,
    "another base": lambda scene: refused(scene, "base", says="base_fingerprint was", base=False),
    "another optimizer": lambda scene: refused(
        scene, "optimizer", "train.optimizer=sgd", says="train.optimizer was adamw"
    ),
    "another method": lambda scene: refused(scene, "method", "train.method=layers", says="method was lander"),
    "other pairs": lambda scene: refused(scene, "pairs", "data.pairs=[en-de, en-fr]", says="prepare"),
    "a start without --auto-resume": lambda scene: refused(
        scene, "unasked", says="--force deletes them", resume=False
    ),
    "a stopped rank": partial(stopped_rank, launched=False),
    "a stopped rank under deepspeed": partial(stopped_rank, launched=True),
    "a rank that hangs": hanging_rank,
    "infinite gradients": bad_gradients,
    "losses of a pair that are not finite": bad_pair,
    "a data worker that dies": dead_worker,
}
"""Name -> what is done; it returns what came of it, or raises `Unexpected`."""
