"""Trainings of a small random model on real sentences, as processes that can be watched, hurt and waited for.

Two ways to start the ranks. `Forked`: from a server that has imported everything once, with the variables that a
launcher sets; a start takes a second instead of ten. `Launched`: by DeepSpeed's own launcher.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lander_ds.checkpoint import checkpoint
from lander_ds.common.errors import ArtefactError
from lander_ds.common.run_directory import RunDirectory
from lander_ds.distributed.process_group import free_port
from lander_ds.method.selection import Selection
from lander_ds.models.weights import base_fingerprint

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.selections import random_selection  # noqa: E402
from support.tiny_run import PAIRS, SELECTED, TinyRun, make_tiny_run  # noqa: E402
from support.worlds import server  # noqa: E402

RANKS = 2
POLL_SECONDS = 0.001
TERMINATE_SECONDS, KILL_SECONDS = 1.0, 5.0
"""After a rank has failed, how long until the others get SIGTERM, and then SIGKILL (DeepSpeed's launcher waits 30 s)."""
WAIT_SECONDS = 300.0
"""No training of this benchmark takes so long."""


class Unexpected(Exception):
    """A training did something else than it should; the message holds the end of its output."""


class Miniature(TinyRun):
    """The tests' run in miniature with a wider model, whose checkpoints take some time to write."""

    def selection(self, layers: tuple[int, ...] = SELECTED) -> Selection:
        """Banks of every kind."""
        neurons = json.loads((self.model / "config.json").read_text())["intermediate_size"]
        built = random_selection(neurons, layers, PAIRS, seed=2)
        return replace(built, metadata={"base_fingerprint": base_fingerprint(self.model)})


def make_miniature(root: Path, width: int, neurons: int) -> Miniature:
    """Build one in `root`; `width` is a multiple of 8."""
    root.mkdir(parents=True)
    built = Miniature(make_tiny_run(root).root)
    config = AutoConfig.from_pretrained(built.model)
    config.hidden_size, config.intermediate_size, config.head_dim = width, neurons, width // 4
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    model.save_pretrained(built.model)
    return built


@contextmanager
def other_base(built: TinyRun) -> Iterator[None]:
    """Within this context one weight of the base model is another."""
    path = built.model / "model.safetensors"
    kept = path.rename(path.with_suffix(".kept"))
    tensors = load_file(kept)
    next(iter(tensors.values())).view(-1)[0] += 1.0
    save_file(tensors, path, metadata={"format": "pt"})
    try:
        yield
    finally:
        kept.replace(path)


class Training(ABC):
    """A running `lander train`."""

    def __init__(self, log: Path) -> None:
        self.log = log

    @abstractmethod
    def pids(self) -> dict[int, int]:
        """Rank -> process id, of the ranks that are there."""

    @abstractmethod
    def ended(self) -> bool:
        """Whether all processes have ended."""

    @abstractmethod
    def code(self) -> int:
        """The exit code of the first rank that failed, which is the launcher's; minus a signal's number where one ended
        it; 0 when all is well."""

    @abstractmethod
    def _attend(self) -> None:
        """What is to be done while a training runs."""

    def signal(self, number: int, ranks: Iterable[int]) -> None:
        """Send a signal to some ranks."""
        actual = self.pids()
        for rank in ranks:
            if rank in actual:
                os.kill(actual[rank], number)

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for a condition.

        Raises:
            Unexpected: the training ended first, or time ran out.
        """
        deadline = time.monotonic() + WAIT_SECONDS
        while not condition():
            self._attend()
            if self.ended():
                raise Unexpected(f"ended with {self.code()} before {what}:\n{self.tail()}")
            if time.monotonic() > deadline:
                raise Unexpected(f"{WAIT_SECONDS:.0f} s have passed without {what}:\n{self.tail()}")
            time.sleep(POLL_SECONDS)

    def wait(self) -> int:
        """Wait for the end; returns the exit code.

        Raises:
            Unexpected: it does not end.
        """
        deadline = time.monotonic() + WAIT_SECONDS
        while not self.ended():
            self._attend()
            if time.monotonic() > deadline:
                self.stop()
                raise Unexpected(f"did not end in {WAIT_SECONDS:.0f} s:\n{self.tail()}")
            time.sleep(10 * POLL_SECONDS)
        return self.code()

    def expect(self, code: int, *texts: str) -> Training:
        """Wait for the end and compare it.

        Raises:
            Unexpected: another exit code, or a text is not in the output.
        """
        actual = self.wait()
        missing = [text for text in texts if text not in self.text()]
        if actual != code or missing:
            raise Unexpected(f"exit code {actual}, not {code}; missing: {missing}\n{self.tail()}")
        return self

    @abstractmethod
    def stop(self) -> None:
        """Kill what is left."""

    def text(self) -> str:
        """What all ranks have written so far."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def line(self, part: str) -> str:
        """The first line of the output with `part`, without time and level."""
        actual = next((line for line in self.text().splitlines() if part in line), "")
        return actual[actual.find(part) :].strip()

    def tail(self) -> str:
        """The end of the output."""
        return "\n".join(self.text().splitlines()[-30:])


class Forked(Training):
    """Ranks forked from a server, watched over as DeepSpeed's launcher does."""

    def __init__(self, arguments: list[str], log: Path, hook: str = "", ranks: int = RANKS) -> None:
        """Start.

        Args:
            arguments: of the command line.
            log: where the ranks write.
            hook: `module:function`, called on every rank before the command line.
            ranks: how many.
        """
        super().__init__(log)
        context = server()
        port = free_port()
        self._first = 0
        self._failed_at: float | None = None
        self._processes: list[BaseProcess] = [
            context.Process(
                target=_rank, args=(rank, ranks, port, arguments, log, hook, dict(os.environ)), daemon=True
            )
            for rank in range(ranks)
        ]
        for process in self._processes:
            process.start()

    def pids(self) -> dict[int, int]:
        return {n: p.pid for n, p in enumerate(self._processes) if p.pid is not None and p.is_alive()}

    def ended(self) -> bool:
        return not any(process.is_alive() for process in self._processes)

    def code(self) -> int:
        self._attend()
        return self._first

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def _attend(self) -> None:
        failed = [process.exitcode for process in self._processes if process.exitcode]
        if not failed:
            return
        if self._failed_at is None:
            self._first, self._failed_at = failed[0], time.monotonic()
        since = time.monotonic() - self._failed_at
        for process in self._processes:
            if process.is_alive() and since > TERMINATE_SECONDS + KILL_SECONDS:
                process.kill()
            elif process.is_alive() and since > TERMINATE_SECONDS:
                process.terminate()


class Launched(Training):
    """Ranks started by DeepSpeed's launcher."""

    def __init__(self, arguments: list[str], log: Path, ranks: int = RANKS) -> None:
        """Start; `arguments` are those of the command line, `log` is where all processes write."""
        super().__init__(log)
        command = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(ranks), "--master_port"]
        with log.open("ab") as stream:
            self.launcher = subprocess.Popen(
                [*command, str(free_port()), "--module", "lander_ds", *arguments],
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._seen: set[psutil.Process] = set()

    def pids(self) -> dict[int, int]:
        return {
            int(argument.partition("=")[2]): process.pid
            for process in self._descendants()
            for argument in _command_line(process)
            if argument.startswith("--local_rank=")
        }

    def ended(self) -> bool:
        self._descendants()
        return self.launcher.poll() is not None and not any(map(_runs, self._seen))

    def code(self) -> int:
        # The launcher writes the code of a killed rank, -9, as 247.
        code = self.launcher.returncode
        return code - 256 if code > 192 else code

    def stop(self) -> None:
        descendants = self._descendants()
        self.launcher.kill()
        self.launcher.wait()
        for process in filter(_runs, descendants):
            process.kill()

    def _attend(self) -> None:
        self._descendants()

    def _descendants(self) -> set[psutil.Process]:
        # Remembered, because a process whose parent has ended is nobody's descendant.
        if self.launcher.poll() is None:
            self._seen |= set(psutil.Process(self.launcher.pid).children(recursive=True))
        return self._seen


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _rank(
    rank: int,
    ranks: int,
    port: int,
    arguments: list[str],
    log: Path,
    hook: str,
    variables: Mapping[str, str],
) -> None:
    import gc

    # What the server has imported stays shared, and out of every collection.
    gc.freeze()
    torch.set_num_threads(1)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # The server may have been started with others.
    os.environ.update(
        variables,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    # multiprocessing lets SIGINT alone, but Python's own handlers are those of the server.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hook:
        module, function = hook.split(":")
        getattr(import_module(module), function)(rank)
    from lander_ds.cli.main import main

    sys.exit(main(arguments))


def arguments(built: TinyRun, run: RunDirectory, *overrides: str, stage: str = "train") -> list[str]:
    """The command line of a stage."""
    sets = [f"run_dir={run.path}", *(override.replace("$root", str(built.root)) for override in overrides)]
    return [stage, "--recipe", str(built.recipe_path), *(f"--set={value}" for value in sets)]


def last_step(run: RunDirectory) -> int:
    """The last step in metrics.jsonl; 0 without one."""
    lines = run.metrics.read_text(encoding="utf-8").splitlines() if run.metrics.exists() else []
    for line in reversed(lines):
        if line.endswith("}") and '"loss"' in line:
            return int(json.loads(line)["step"])
    return 0


def whole(run: RunDirectory) -> dict[int, str]:
    """Step -> hash of everything in it, of the checkpoints that are what was written."""
    actual = {}
    for step in checkpoint.steps(run.checkpoints):
        try:
            actual[step] = json.dumps(
                checkpoint.load(run.checkpoints / f"step-{step}").verified().state["files"]
            )
        except ArtefactError:
            continue
    return actual


def being_saved(run: RunDirectory) -> list[str]:
    """Directories of checkpoints that are not complete yet."""
    try:
        names = os.listdir(run.checkpoints)
    except FileNotFoundError:
        return []
    return [name for name in names if name.startswith(".step-") and not name.endswith(".old.tmp")]


def differences(run: RunDirectory, expected: RunDirectory) -> list[str]:
    """What differs in the newest checkpoints and the metrics of two trainings; empty: they are bitwise equal."""
    one, other = checkpoint.newest(run.checkpoints), checkpoint.newest(expected.checkpoints)
    actual = [key for key in ("step", "progress", "group_steps") if one.state[key] != other.state[key]]
    for kind, tensors, wanted in (
        ("weights", one.trained(), other.trained()),
        ("optimizer state", one.optimizer(), other.optimizer()),
    ):
        if not _same(tensors, wanted):
            actual.append(kind)
    if _figures(run) != _figures(expected):
        actual.append("metrics")
    return actual


def expect_same(run: RunDirectory, expected: RunDirectory) -> None:
    """Compare two trainings.

    Raises:
        Unexpected: they are not bitwise equal.
    """
    if actual := differences(run, expected):
        raise Unexpected(f"{run.path}: {', '.join(actual)} differ from the uninterrupted training")


def _same(tensors: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> bool:
    return set(tensors) == set(wanted) and all(torch.equal(tensors[name], wanted[name]) for name in wanted)


def _figures(run: RunDirectory) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock says."""
    clock = ("seconds", "processor_seconds", "tokens_per_second", "eta_seconds")
    lines = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]
