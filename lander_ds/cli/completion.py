"""`lander completion`: what lets a shell complete commands, flags and paths."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from lander_ds.cli.parser import make_parser
from lander_ds.common import console
from lander_ds.common.errors import ConfigError

_DIRECTORIES = ("DIR", "RUN_DIR", "BASE", "DELTA", "MODEL", "OUT")
_FILES = ("FILE", "HOSTS", "PATH")
"""Metavariables of the parser that stand for paths."""


def run(arguments: argparse.Namespace) -> None:
    """Print the script for a shell.

    Raises:
        ConfigError: shtab, which writes it, is not installed.
    """
    if find_spec("shtab") is None:
        raise ConfigError(
            "lander completion: shtab is not installed: pip install 'lander-ds[completion]', or pip install shtab"
        )
    import shtab  # noqa: PLC0415

    parser = make_parser()
    for action in _actions(parser):
        if isinstance(action, argparse._SubParsersAction):
            # shtab leaves out what the help text leaves out.
            action.help = None
        elif action.metavar in _DIRECTORIES:
            action.complete = shtab.DIRECTORY
        elif action.metavar in _FILES:
            action.complete = shtab.FILE
    console.write_line(shtab.complete(parser, shell=arguments.shell).rstrip("\n"))


def _actions(parser: argparse.ArgumentParser) -> Iterator[Any]:
    """Arguments of the parser and of all commands in it."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
