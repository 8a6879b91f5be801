"""`lander` commands in processes of their own, forked from the server of the worlds, which has imported everything.

For tests to which the start of an interpreter is not the point: it costs many times what their commands do.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from multiprocessing.connection import Client, Listener
from pathlib import Path
from threading import Thread

from support.worlds import server

ASK = Path(__file__).with_name("ask.py")


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int | None
    """Minus the number of the signal that ended it."""
    output: str
    errors: str


class Command:
    """A command at work."""

    def __init__(
        self,
        arguments: Sequence[str],
        directory: Path,
        environment: Mapping[str, str] | None = None,
        search: str = "",
        before: Callable[[], None] | None = None,
    ) -> None:
        """Start it.

        Args:
            arguments: of `lander`.
            directory: where it is called.
            environment: variables besides those of this process.
            search: a directory that is searched for packages before all others.
            before: called in the new process before the command line.
        """
        self._files = Path(tempfile.mkdtemp(prefix="lander-command-"))
        variables = {**os.environ, **(environment or {})}
        self.process = server().Process(
            target=_run, args=(list(arguments), directory, variables, search, before, self._files)
        )
        self.process.start()

    def wait(self, seconds: float = 120.0) -> Ended:
        """Until it ends; it is killed when time has run out."""
        self.process.join(seconds)
        self.process.kill()
        self.process.join()
        output, errors = ((self._files / name).read_text(encoding="utf-8") for name in ("output", "errors"))
        shutil.rmtree(self._files)
        return Ended(self.process.exitcode, output, errors)


def lander(*arguments: str, directory: Path, seconds: float = 120.0) -> None:
    """Run a command that must end well."""
    ended = Command(arguments, directory).wait(seconds)
    assert ended.code == 0, ended.output[-2000:] + ended.errors[-4000:]


@contextmanager
def preloaded(directory: Path) -> Iterator[str]:
    """What to write in place of `lander` in a command line within this context; the commands run one at a time.

    For programs that start `lander` themselves. `directory` has a short path.
    """
    address = str(directory / "lander.socket")
    with Listener(address) as listener:
        thread = Thread(target=_serve, args=(listener,), daemon=True)
        thread.start()
        try:
            yield shlex.join([sys.executable, str(ASK), address])
        finally:
            with Client(address) as last:
                last.send(None)
            thread.join()


def _serve(listener: Listener) -> None:
    while True:
        with listener.accept() as connection:
            request = connection.recv()
            if request is None:
                return
            arguments, path = request
            connection.send(astuple(Command(arguments, Path(path)).wait(300.0)))


def _run(
    arguments: list[str],
    directory: Path,
    variables: Mapping[str, str],
    search: str,
    before: Callable[[], None] | None,
    files: Path,
) -> None:
    import torch

    from lander_ds.cli.main import main

    for number, name in ((1, "output"), (2, "errors")):
        os.dup2(os.open(files / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(variables, OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if search:
        sys.path.insert(0, search)
    if before is not None:
        before()
    sys.exit(main(arguments))
