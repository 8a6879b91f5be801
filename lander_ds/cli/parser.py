"""The arguments of `lander`. Imports nothing heavy: every command names the function that does its work as `target`."""

from __future__ import annotations

import argparse
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lander_ds.common.errors import ExitCode
from lander_ds.common.shipped import SIZES
from lander_ds.stages import catalogue
from lander_ds.stages.catalogue import ALL, STAGES
from lander_ds.version import __version__

Commands = argparse._SubParsersAction

OTHER_COMMANDS: dict[str, str] = {
    ALL: "every stage, in order, in one process group",
    "init": "write a first recipe for a model and corpora of your own",
    "config": "check, resolve and explain recipes",
    "summary": "print the figures of a run",
    "tokenizer": "train a SentencePiece tokenizer on a recipe's corpora",
    "delta": "put a delta onto its base, take it off, or make one from two models",
    "doctor": "before a run: whether all hosts are ready, and how fast their network is",
    "experiment": "a grid of runs over one data plan: methods x seeds, tuned alike, compared in one table",
    "plan": "what fits on a cluster, and how long a step takes there; needs no weights and no GPU",
    "completion": "print what lets bash, zsh or tcsh complete this command",
}

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

_DELTA = """\
A delta holds what a fine-tuning changed in a base model, bit by bit. It needs the base and gives both back exactly:

  lander delta apply  BASE DELTA OUT     the fine-tuned model: routed where the delta has gates, else dense
  lander delta diff   BASE MODEL OUT     a delta from any two models of one architecture and type
  lander delta revert MODEL DELTA OUT    the base, byte for byte

Stage export writes deltas with export.formats: [delta]. `lander delta COMMAND --help` says more."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line; `target` names what is called with the result.

    Raises:
        SystemExit: it is wrong, or asks for help.
    """
    # DeepSpeed's launcher adds --local_rank=N; LOCAL_RANK says the same.
    kept = [argument for argument in argv if not argument.startswith(("--local_rank=", "--local-rank="))]
    arguments = make_parser().parse_args(kept)
    if getattr(arguments, "stage", None) == "translate":
        _finish_translate(arguments)
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
            others=_listing(OTHER_COMMANDS),
        ),
        epilog=_EPILOG.format(exit_codes=textwrap.fill(_EXIT_CODES.format(codes=codes), 118)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lander-ds {__version__}")
    commands = parser.add_subparsers(prog="lander", metavar="COMMAND", required=True, help=argparse.SUPPRESS)
    for stage in STAGES.values():
        _add_stage(commands, stage.name, stage.summary, stage.example)
    everything = _add_stage(commands, ALL, OTHER_COMMANDS[ALL], "--set run_dir=runs/mine")
    everything.add_argument(
        "--stages",
        type=_stages,
        default=tuple(STAGES),
        metavar="LIST",
        help="only these, with commas, e.g. prepare,train,translate,score",
    )
    for add in (
        _add_init,
        _add_config,
        _add_summary,
        _add_tokenizer,
        _add_delta,
        _add_doctor,
        _add_experiment,
        _add_plan,
        _add_completion,
    ):
        add(commands)
    return parser


def _add_init(commands: Commands[Any]) -> None:
    example = (
        "lander init --model models/my-llama --pairs en-de,de-en \\\n"
        "    --train 'corpora/{pair}.jsonl' --valid 'corpora/dev.{pair}.tsv' --test 'corpora/test.{pair}.tsv'"
    )
    parser = _command(commands, "init", OTHER_COMMANDS["init"], example)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="the base model: its directory, or a hub id")
    add("--pairs", type=_pairs, required=True, metavar="LIST", help="directions, with commas: en-de,de-en")
    for split in ("train", "valid", "test"):
        add(
            f"--{split}",
            action="append",
            required=True,
            metavar="PATH",
            help=f"{split} corpus; {{pair}}, {{src}} and {{tgt}} are filled in; may be repeated",
        )
    add(
        "--output",
        type=_path,
        default="recipe.yaml",
        metavar="FILE",
        help="the recipe (default: recipe.yaml)",
    )
    add("--run-dir", metavar="DIR", help="where the run will lie (default: runs/ and the recipe's name)")
    add(
        "--topology",
        choices=("zero3", "replicated"),
        default="zero3",
        help="how the model is spread over the ranks (default: zero3); lander plan says more",
    )
    add("--size", choices=SIZES, help="of the model (default: by its config.json)")
    parser.set_defaults(target="lander_ds.cli.init:run")


def _pairs(text: str) -> tuple[str, ...]:
    return tuple(pair.strip() for pair in text.split(","))


def _add_completion(commands: Commands[Any]) -> None:
    example = 'eval "$(lander completion bash)"'
    parser = _command(commands, "completion", OTHER_COMMANDS["completion"], example)
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="for which shell")
    parser.set_defaults(target="lander_ds.cli.completion:run")


def _listing(commands: Mapping[str, str]) -> str:
    return "\n".join(f"  {name:10}  {text}" for name, text in commands.items())


def _command(commands: Commands[Any], name: str, text: str, example: str) -> argparse.ArgumentParser:
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


def _add_recipe(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument("--recipe", type=_path, required=required, metavar="FILE", help="the recipe (YAML)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="change a key, e.g. train.lr.general=1e-4 or data.corpora.0.limit=100; may be repeated",
    )


def _add_stage(commands: Commands[Any], name: str, text: str, flags: str) -> argparse.ArgumentParser:
    parser = _command(commands, name, text, f"lander {name} --recipe recipes/demo.yaml {flags}")
    _add_recipe(parser, required=name != "translate")
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


def _stages(text: str) -> tuple[str, ...]:
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
    add("--run", type=_path, metavar="DIR", help="a run directory, whose recipe it is")
    add("--system", choices=("trained", "base"), default="trained", help="default: trained")
    add("--model", type=_path, metavar="DIR", help="an export, in place of the run's base and checkpoint")
    add("--untrained", action="store_true", help="PAIR was not trained: it runs on the general banks")
    add("--jsonl", action="store_true", help="the input is JSON lines, whatever its name is")
    add(
        "--n-best",
        type=_positive_number,
        default=1,
        metavar="N",
        help="write JSON lines with the N best and their scores",
    )
    parser.set_defaults(parser=parser)


def _finish_translate(arguments: argparse.Namespace) -> None:
    """Tell the stage from the translation of text."""
    error = arguments.parser.error
    if arguments.input is None:
        given = [name for name in ("pair", "output", "run", "model") if getattr(arguments, name) is not None]
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


def _add_config(commands: Commands[Any]) -> None:
    parser = _command(
        commands, "config", OTHER_COMMANDS["config"], "lander config --recipe my.yaml --set seed=2 --dump"
    )
    _add_recipe(parser, required=False)
    add = parser.add_argument
    add("--dump", action="store_true", help="print the recipe with every default and override")
    add(
        "--explain",
        nargs="?",
        const="",
        metavar="KEY",
        help="print type, default and meaning of KEY, or of every key",
    )
    add("--markdown", action="store_true", help="with --explain: as a Markdown page")
    parser.set_defaults(target="lander_ds.cli.config:run", parser=parser)


def _add_summary(commands: Commands[Any]) -> None:
    parser = _command(commands, "summary", OTHER_COMMANDS["summary"], "lander summary runs/demo --json")
    parser.add_argument("run_dir", type=_path, metavar="RUN_DIR", help="directory of the run")
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")
    parser.set_defaults(target="lander_ds.cli.summary:run")


def _add_tokenizer(commands: Commands[Any]) -> None:
    example = "lander tokenizer --recipe my.yaml --out models/my-tokenizer --vocab-size 8000"
    parser = _command(commands, "tokenizer", OTHER_COMMANDS["tokenizer"], example)
    _add_recipe(parser)
    add = parser.add_argument
    add("--out", type=_path, required=True, metavar="DIR", help="where the tokenizer is written")
    add("--vocab-size", type=int, required=True, metavar="N", help="number of pieces")
    add("--model-type", choices=("unigram", "bpe"), default="unigram", help="default: unigram")
    add(
        "--character-coverage",
        type=float,
        default=0.9995,
        metavar="SHARE",
        help="share of characters with a piece",
    )
    parser.set_defaults(target="lander_ds.cli.tokenizer:run")


def _add_delta(commands: Commands[Any]) -> None:
    parser = _command(
        commands,
        "delta",
        OTHER_COMMANDS["delta"],
        "lander delta apply models/base runs/demo/export/delta models/mine",
    )
    parser.usage, parser.description = "lander delta [-h] COMMAND ...", _DELTA
    kinds = parser.add_subparsers(
        prog="lander delta", metavar="COMMAND", required=True, help=argparse.SUPPRESS
    )
    apply = _delta_command(kinds, "apply", "Write the model that a delta makes of its base.", "BASE", "DELTA")
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
    diff = _delta_command(kinds, "diff", "Write the delta that makes MODEL of BASE.", "BASE", "MODEL")
    for command in (apply, diff):
        command.add_argument(
            "--allow-pickle", action="store_true", help="open pytorch_model.bin; only from a source you trust"
        )
    _delta_command(kinds, "revert", "Write the base that MODEL was made of, byte for byte.", "MODEL", "DELTA")


def _delta_command(
    commands: Commands[Any], name: str, text: str, first: str, second: str
) -> argparse.ArgumentParser:
    example = f"lander delta {name} {first.lower()} {second.lower()} out"
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("first", type=_path, metavar=first, help="directory")
    add("second", type=_path, metavar=second, help="directory")
    add("out", type=_path, metavar="OUT", help="directory to write; it must not exist")
    add("--force", action="store_true", help="replace OUT, if it is a model or a delta")
    add("--verbose", action="store_true", help="also log details")
    parser.set_defaults(target=f"lander_ds.cli.delta:{name}", parser=parser)
    return parser


def _add_doctor(commands: Commands[Any]) -> None:
    example = "lander doctor --recipe recipes/demo.yaml --hostfile hosts"
    parser = _command(commands, "doctor", OTHER_COMMANDS["doctor"], example)
    _add_recipe(parser)
    add = parser.add_argument
    add(
        "--hostfile",
        type=_path,
        metavar="HOSTS",
        help="the hosts; without it: this machine alone, and no ssh",
    )
    add(
        "--ranks",
        type=_positive_number,
        metavar="N",
        help="without a hostfile: ranks on this machine (default: one per GPU, else 2)",
    )
    add(
        "--launcher",
        choices=("pdsh", "ssh"),
        default="pdsh",
        help="pdsh: DeepSpeed's default; ssh: another one, pdsh and .deepspeed_env do not matter (default: pdsh)",
    )
    add("--ssh", default="ssh", metavar="COMMAND", help="ssh with options, e.g. 'ssh -i KEY'")
    add("--ssh-port", type=_positive_number, metavar="N", help="where sshd listens on the hosts")
    add("--python", metavar="PATH", help="the interpreter on the hosts (default: the path of this one)")
    add("--master-addr", metavar="ADDRESS", help="where ranks meet (default: as DeepSpeed chooses)")
    add(
        "--master-port",
        type=_positive_number,
        default=os.environ.get("MASTER_PORT", "29500"),
        metavar="N",
        help="the port where ranks meet (default: $MASTER_PORT, else 29500)",
    )
    add(
        "--timeout",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="for each question to a host (default: 120)",
    )
    add("--json", action="store_true", help="as JSON, for programs")
    parser.set_defaults(target="lander_ds.cli.doctor:run", parser=parser)


def _add_experiment(commands: Commands[Any]) -> None:
    example = "lander experiment experiments/tiny.yaml --slots 2"
    parser = _command(commands, "experiment", OTHER_COMMANDS["experiment"], example)
    add = parser.add_argument
    add("experiment", type=_path, metavar="FILE", help="the experiment (YAML)")
    add(
        "--only",
        action="append",
        default=[],
        metavar="PATTERN",
        help="only cells whose names fit, e.g. 'steps/*/lora*'; with the trials they need; may be repeated",
    )
    add("--slots", type=_positive_number, default=1, metavar="N", help="cells at the same time (default: 1)")
    add("--table", action="store_true", help="run nothing: render what is finished")
    add("--list", action="store_true", help="run nothing: list the cells and whether they are finished")
    parser.set_defaults(target="lander_ds.cli.experiment:run")


def _path(text: str) -> Path:
    """Of `--out=~/x` the shell leaves the tilde as it is."""
    return Path(text).expanduser()


def _positive_number(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def _add_plan(commands: Commands[Any]) -> None:
    example = "lander plan --recipe recipes/7b.yaml --cluster examples/clusters/8xa100-80g.yaml"
    parser = _command(commands, "plan", OTHER_COMMANDS["plan"], example)
    _add_recipe(parser)
    add = parser.add_argument
    add(
        "--cluster", type=_path, required=True, metavar="FILE", help="the machines (examples/clusters/*.yaml)"
    )
    add("--json", action="store_true", help="as JSON, for programs, with every stage of every plan")
    add("--all", action="store_true", help="every number of stages, not only the best of each JSON")
    add("--plot", type=_path, metavar="FILE", help="draw speed and memory over 1, 2, 4, ... machines")
    add(
        "--nodes",
        type=_count,
        metavar="N",
        help="most machines in the plot (default: 8, or the cluster's)",
    )
    add(
        "--example-tokens",
        type=_count,
        default=96,
        metavar="N",
        help="average tokens of an example, prompt and target (default: 96)",
    )
    add(
        "--target-share",
        type=_share,
        default=0.5,
        metavar="SHARE",
        help="target tokens over all tokens (default: 0.5)",
    )
    parser.set_defaults(target="lander_ds.cli.plan:run")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError("must be above 0 and at most 1")
    return value
