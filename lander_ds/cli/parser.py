"""The command line of `lander`. Imports nothing heavy: every command names the function that does its work as `target`."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Mapping, Sequence

from lander_ds.cli.command_arguments import COMMANDS
from lander_ds.cli.stage_arguments import add_stage, finish_translate, stages
from lander_ds.common.errors import ExitCode
from lander_ds.stages.catalogue import ALL, STAGES
from lander_ds.version import __version__

_ALL = "every stage, in order, in one process group"
_DESCRIPTION = """\
Detect language-aware neurons of a large language model, and fine-tune only those for machine translation.

A recipe (YAML) describes a run. Its stages, in order:
{stages}

Further commands:
{others}"""

_EPILOG = """\
examples:
  lander all --recipe recipes/demo.yaml                      every stage, one process
  deepspeed --num_gpus 8 --module lander_ds train --recipe recipes/demo.yaml
  lander config --recipe recipes/demo.yaml --dump            the recipe with all its defaults
  lander config --explain train.lr                           what a key means
  lander summary runs/demo --json                            the figures of a run
  lander translate --run runs/demo --pair en-de --input -    text, line by line

{exit_codes}"""

_EXIT_CODES = (
    "`lander COMMAND --help` says more. Exit codes: {codes}. After 75 and 76, and after a machine failed, the same "
    "command with --auto-resume goes on."
)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line; `target` names what is called with the result.

    Raises:
        SystemExit: it is wrong, or asks for help.
    """
    # DeepSpeed's launcher adds --local_rank=N; LOCAL_RANK says the same.
    kept = [argument for argument in argv if not argument.startswith(("--local_rank=", "--local-rank="))]
    arguments = make_parser().parse_args(kept)
    if getattr(arguments, "stage", None) == "translate":
        finish_translate(arguments)
    if getattr(arguments, "explain", None) is not None:
        # Explaining needs no recipe, and none of what checking one imports.
        arguments.target = "lander_ds.cli.explain:run"
    return arguments


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    codes = ", ".join(f"{code} {code.meaning}" for code in ExitCode)
    parser = argparse.ArgumentParser(
        "lander",
        usage="lander [-h] [--version] COMMAND ...",
        description=_DESCRIPTION.format(
            stages=_listing({stage.name: stage.summary for stage in STAGES.values()}),
            others=_listing({ALL: _ALL, **{name: summary for name, (summary, _) in COMMANDS.items()}}),
        ),
        epilog=_EPILOG.format(exit_codes=textwrap.fill(_EXIT_CODES.format(codes=codes), 118)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lander-ds {__version__}")
    commands = parser.add_subparsers(prog="lander", metavar="COMMAND", required=True, help=argparse.SUPPRESS)
    for stage in STAGES.values():
        add_stage(commands, stage.name, stage.summary, stage.example)
    everything = add_stage(commands, ALL, _ALL, "--set run_dir=runs/mine")
    everything.add_argument(
        "--stages",
        type=stages,
        default=tuple(STAGES),
        metavar="LIST",
        help="only these, with commas, e.g. prepare,train,translate,score",
    )
    for summary, add in COMMANDS.values():
        add(commands, summary)
    return parser


def _listing(commands: Mapping[str, str]) -> str:
    return "\n".join(f"  {name:10}  {text}" for name, text in commands.items())
