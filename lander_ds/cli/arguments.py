"""What the parsers of several commands share: how a command looks, the recipe's flags, types of values."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lander_ds.common.errors import ConfigError

Commands = argparse._SubParsersAction


def command(commands: Commands[Any], name: str, text: str, example: str) -> argparse.ArgumentParser:
    """Add a command.

    Args:
        commands: the program's.
        name: of it.
        text: what it does.
        example: a command line.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        # For shell completion; our own listing stands in the description of the whole.
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--verbose", action="store_true", help="also log details")
    return parser


def add_recipe(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add --recipe and --set."""
    parser.add_argument("--recipe", type=path, required=required, metavar="FILE", help="the recipe (YAML)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="change a key, e.g. train.lr.general=1e-4 or data.corpora.0.limit=100; may be repeated",
    )


def path(text: str) -> Path:
    """Of `--out=~/x` the shell leaves the tilde as it is."""
    return Path(text).expanduser()


def check_output(output: Path) -> None:
    """Before there is something to write.

    Raises:
        ConfigError: the directory of a file is missing.
    """
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"--output {output}: there is no such directory: make it")


def positive_number(text: str) -> int:
    """At least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def share(text: str) -> float:
    """Above 0, at most 1."""
    value = float(text)
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError("must be above 0 and at most 1")
    return value
