"""Arguments of the stages, and of translating text, which stage translate does with --input."""

from __future__ import annotations

import argparse
from typing import Any

from lander_ds.cli.arguments import Commands, add_recipe, command, path, positive_number
from lander_ds.stages import catalogue
from lander_ds.stages.catalogue import STAGES


def add_stage(commands: Commands[Any], name: str, text: str, flags: str) -> argparse.ArgumentParser:
    """Add a stage, or all of them as one command; `flags`: of the example."""
    parser = command(commands, name, text, f"lander {name} --recipe recipes/demo.yaml {flags}")
    add_recipe(parser, required=name != "translate")
    if name == "translate":
        _add_text(parser)
    parser.add_argument("--force", action="store_true", help="run again although the outputs are up to date")
    if catalogue.resumes(name):
        parser.add_argument(
            "--auto-resume",
            action="store_true",
            help="go on from the newest whole checkpoint, if there is one",
        )
    parser.set_defaults(target="lander_ds.cli.stages:run", stage=name, stages=catalogue.names(name))
    return parser


def stages(text: str) -> tuple[str, ...]:
    """Stages, in their order, of a list with commas."""
    wanted = text.split(",")
    if unknown := [name for name in wanted if name not in STAGES]:
        raise argparse.ArgumentTypeError(f"no stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
    return tuple(name for name in STAGES if name in wanted)


def _add_text(parser: argparse.ArgumentParser) -> None:
    """The flags of stage translate that make it translate text."""
    parser.usage = (
        "lander translate [-h] --recipe FILE [...]\n"
        "       lander translate (--recipe FILE | --run DIR) --input FILE --pair PAIR [...]"
    )
    group = parser.add_argument_group(
        "text", "with --input, text without references is translated instead of the test split"
    )
    add = group.add_argument
    add(
        "--input",
        metavar="FILE",
        help="text, a segment per line, or JSON lines with src; - is standard input",
    )
    add("--pair", metavar="PAIR", help="its direction, for example en-de")
    add(
        "--output",
        metavar="FILE",
        help="default: standard output; with a file, an interrupted translation goes on",
    )
    add("--run", type=path, metavar="DIR", help="a run directory, whose recipe it is")
    add("--system", choices=("trained", "base"), default="trained", help="default: trained")
    add("--model", type=path, metavar="DIR", help="an export, in place of the run's base and checkpoint")
    add("--untrained", action="store_true", help="PAIR was not trained: it runs on the general banks")
    add("--jsonl", action="store_true", help="the input is JSON lines, whatever its name is")
    add(
        "--n-best",
        type=positive_number,
        default=1,
        metavar="N",
        help="write JSON lines with the N best, or N samples (translate.sampling), and their scores",
    )
    add(
        "--prompts",
        action="store_true",
        help="write the prompts in place of translations, for other programs (docs/serving.md)",
    )
    parser.set_defaults(parser=parser)


def finish_translate(arguments: argparse.Namespace) -> None:
    """Tell the stage from the translation of text."""
    error = arguments.parser.error
    if arguments.input is None:
        flags = ("pair", "output", "run", "model", "prompts")
        given = [name for name in flags if getattr(arguments, name) not in (None, False)]
        if given:
            error(f"--{given[0]} needs --input FILE")
        if arguments.recipe is None:
            error("the following arguments are required: --recipe")
        return
    if (arguments.recipe is None) == (arguments.run is None):
        error("--input needs either --recipe FILE or --run DIR")
    if arguments.pair is None:
        error("--input needs --pair PAIR, for example --pair en-de")
    arguments.target = "lander_ds.cli.text:run"
