"""`lander delta apply|diff|revert`: the arguments, and what they call."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "put a delta onto its base, take it off, or make one from two models"

_DESCRIPTION = """\
A delta holds what a fine-tuning changed in a base model, bit by bit. It needs the base and gives both back exactly:

  lander delta apply  BASE DELTA OUT     the fine-tuned model: routed where the delta has gates, else dense
  lander delta diff   BASE MODEL OUT     a delta from any two models of one architecture and type
  lander delta revert MODEL DELTA OUT    the base, byte for byte

Stage export writes deltas with export.formats: [delta]. `lander delta COMMAND --help` says more."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `lander delta` its three commands."""
    parser.usage, parser.description = "lander delta [-h] COMMAND ...", _DESCRIPTION
    commands = parser.add_subparsers(
        prog="lander delta", metavar="COMMAND", required=True, help=argparse.SUPPRESS
    )
    apply = _command(commands, "apply", "Write the model that a delta makes of its base.", "BASE", "DELTA")
    form = apply.add_mutually_exclusive_group()
    form.add_argument(
        "--fold",
        metavar="PAIR",
        help="dense, with the mean gates of PAIR (or of all pairs: mean) in its weights",
    )
    form.add_argument("--dense", action="store_true", help="dense, without the gates")
    apply.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="default: the base's types"
    )
    apply.add_argument("--shard-size", type=float, metavar="GB", help="largest weight file in gigabytes")
    apply.set_defaults(command=_apply, parser=apply)
    diff = _command(commands, "diff", "Write the delta that makes MODEL of BASE.", "BASE", "MODEL")
    diff.set_defaults(command=_diff)
    for command in (apply, diff):
        command.add_argument(
            "--allow-pickle", action="store_true", help="open pytorch_model.bin; only from a source you trust"
        )
    revert = _command(
        commands, "revert", "Write the base that MODEL was made of, byte for byte.", "MODEL", "DELTA"
    )
    revert.set_defaults(command=_revert)


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    text: str,
    first: str,
    second: str,
) -> argparse.ArgumentParser:
    example = f"lander delta {name} {first.lower()} {second.lower()} out"
    parser = commands.add_parser(
        name,
        description=text,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("first", type=Path, metavar=first, help="directory")
    parser.add_argument("second", type=Path, metavar=second, help="directory")
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to write; it must not exist")
    parser.add_argument("--force", action="store_true", help="replace OUT, if it is a model or a delta")
    parser.add_argument("--verbose", action="store_true", help="also log details")
    return parser


def _apply(arguments: argparse.Namespace) -> None:
    import torch

    from lander_ds.export.delta_apply import Options, apply_delta
    from lander_ds.export.writer import GIGABYTE, Form

    size = arguments.shard_size
    if size is not None and not size > 0:
        arguments.parser.error(f"--shard-size must be above 0, found {size}")
    form = Form(
        None if arguments.dtype is None else getattr(torch, arguments.dtype),
        None if size is None else max(1, round(size * GIGABYTE)),
    )
    options = Options(arguments.fold, arguments.dense, form, arguments.allow_pickle)
    apply_delta(arguments.first, arguments.second, arguments.out, options, arguments.force)


def _diff(arguments: argparse.Namespace) -> None:
    from lander_ds.export.delta_apply import diff_models

    diff_models(arguments.first, arguments.second, arguments.out, arguments.force, arguments.allow_pickle)


def _revert(arguments: argparse.Namespace) -> None:
    from lander_ds.export.delta_apply import revert_delta

    revert_delta(arguments.first, arguments.second, arguments.out, arguments.force)
