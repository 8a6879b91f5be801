"""Arguments of the commands that are no stages; each names the function that does its work as `target`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

from lander_ds.cli.arguments import Commands, add_recipe, command, path, positive_number, share
from lander_ds.common.shipped import SIZES

_DELTA = """\
A delta holds what a fine-tuning changed in a base model, bit by bit. It needs the base and gives both back exactly:

  lander delta apply  BASE DELTA OUT     the fine-tuned model: routed where the delta has gates, else dense
  lander delta diff   BASE MODEL OUT     a delta from any two models of one architecture and type
  lander delta revert MODEL DELTA OUT    the base, byte for byte

Stage export writes deltas with export.formats: [delta]. `lander delta COMMAND --help` says more."""


def _add_init(commands: Commands[Any], summary: str) -> None:
    example = (
        "lander init --model models/my-llama --pairs en-de,de-en \\\n"
        "    --train 'corpora/{pair}.jsonl' --valid 'corpora/dev.{pair}.tsv' --test 'corpora/test.{pair}.tsv'"
    )
    parser = command(commands, "init", summary, example)
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
        type=path,
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


def _add_config(commands: Commands[Any], summary: str) -> None:
    parser = command(commands, "config", summary, "lander config --recipe my.yaml --set seed=2 --dump")
    add_recipe(parser, required=False)
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


def _add_summary(commands: Commands[Any], summary: str) -> None:
    parser = command(commands, "summary", summary, "lander summary runs/demo --json")
    parser.add_argument("run_dir", type=path, metavar="RUN_DIR", help="directory of the run")
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")
    parser.set_defaults(target="lander_ds.cli.summary:run")


def _add_tokenizer(commands: Commands[Any], summary: str) -> None:
    example = "lander tokenizer --recipe my.yaml --out models/my-tokenizer --vocab-size 8000"
    parser = command(commands, "tokenizer", summary, example)
    add_recipe(parser)
    add = parser.add_argument
    add("--out", type=path, required=True, metavar="DIR", help="where the tokenizer is written")
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


def _add_candidates(commands: Commands[Any], summary: str) -> None:
    example = "lander candidates candidates.en-de.jsonl --reference tgt --output preferred.en-de.jsonl"
    parser = command(commands, "candidates", summary, example)
    add = parser.add_argument
    add(
        "input", type=path, metavar="FILE", help="what lander translate --input corpus.jsonl --n-best N wrote"
    )
    add("--output", type=path, required=True, metavar="FILE", help="preferences as JSON lines")
    add("--reference", default="tgt", metavar="KEY", help="where references stand in a line (default: tgt)")
    add(
        "--metric",
        default="chrf",
        metavar="NAME",
        help="chrf (default), or a metric in score.neural of --recipe",
    )
    add(
        "--chosen",
        choices=("reference", "best"),
        default="reference",
        help="the better translation: the reference (default), or the best candidate",
    )
    add(
        "--margin",
        type=float,
        default=0.0,
        metavar="POINTS",
        help="leave out pairs whose scores differ by less (default: 0)",
    )
    add_recipe(parser, required=False)
    parser.set_defaults(target="lander_ds.cli.candidates:run")


def _add_delta(commands: Commands[Any], summary: str) -> None:
    parser = command(
        commands,
        "delta",
        summary,
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
    for reading in (apply, diff):
        reading.add_argument(
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
    add("first", type=path, metavar=first, help="directory")
    add("second", type=path, metavar=second, help="directory")
    add("out", type=path, metavar="OUT", help="directory to write; it must not exist")
    add("--force", action="store_true", help="replace OUT, if it is a model or a delta")
    add("--verbose", action="store_true", help="also log details")
    parser.set_defaults(target=f"lander_ds.cli.delta:{name}", parser=parser)
    return parser


def _add_doctor(commands: Commands[Any], summary: str) -> None:
    example = "lander doctor --recipe recipes/demo.yaml --hostfile hosts"
    parser = command(commands, "doctor", summary, example)
    add_recipe(parser)
    add = parser.add_argument
    add(
        "--hostfile",
        type=path,
        metavar="HOSTS",
        help="the hosts; without it: this machine alone, and no ssh",
    )
    add(
        "--ranks",
        type=positive_number,
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
    add("--ssh-port", type=positive_number, metavar="N", help="where sshd listens on the hosts")
    add("--python", metavar="PATH", help="the interpreter on the hosts (default: the path of this one)")
    add("--master-addr", metavar="ADDRESS", help="where ranks meet (default: as DeepSpeed chooses)")
    add(
        "--master-port",
        type=positive_number,
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


def _add_experiment(commands: Commands[Any], summary: str) -> None:
    example = "lander experiment experiments/tiny.yaml --slots 2"
    parser = command(commands, "experiment", summary, example)
    add = parser.add_argument
    add("experiment", type=path, metavar="FILE", help="the experiment (YAML)")
    add(
        "--only",
        action="append",
        default=[],
        metavar="PATTERN",
        help="only cells whose names fit, e.g. 'steps/*/lora*'; with the trials they need; may be repeated",
    )
    add("--slots", type=positive_number, default=1, metavar="N", help="cells at the same time (default: 1)")
    add("--table", action="store_true", help="run nothing: render what is finished")
    add("--list", action="store_true", help="run nothing: list the cells and whether they are finished")
    parser.set_defaults(target="lander_ds.cli.experiment:run")


def _add_plan(commands: Commands[Any], summary: str) -> None:
    example = "lander plan --recipe recipes/7b.yaml --cluster examples/clusters/8xa100-80g.yaml"
    parser = command(commands, "plan", summary, example)
    add_recipe(parser)
    add = parser.add_argument
    add("--cluster", type=path, required=True, metavar="FILE", help="the machines (examples/clusters/*.yaml)")
    add("--json", action="store_true", help="as JSON, for programs, with every stage of every plan")
    add("--all", action="store_true", help="every number of stages, not only the best of each JSON")
    add("--plot", type=path, metavar="FILE", help="draw speed and memory over 1, 2, 4, ... machines")
    add(
        "--nodes",
        type=positive_number,
        metavar="N",
        help="most machines in the plot (default: 8, or the cluster's)",
    )
    add(
        "--example-tokens",
        type=positive_number,
        default=96,
        metavar="N",
        help="average tokens of an example, prompt and target (default: 96)",
    )
    add(
        "--target-share",
        type=share,
        default=0.5,
        metavar="SHARE",
        help="target tokens over all tokens (default: 0.5)",
    )
    parser.set_defaults(target="lander_ds.cli.plan:run")


def _add_completion(commands: Commands[Any], summary: str) -> None:
    example = 'eval "$(lander completion bash)"'
    parser = command(commands, "completion", summary, example)
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="for which shell")
    parser.set_defaults(target="lander_ds.cli.completion:run")


COMMANDS: dict[str, tuple[str, Callable[[Commands[Any], str], None]]] = {
    "init": ("write a first recipe for a model and corpora of your own", _add_init),
    "config": ("check, resolve and explain recipes", _add_config),
    "summary": ("print the figures of a run", _add_summary),
    "tokenizer": ("train a SentencePiece tokenizer on a recipe's corpora", _add_tokenizer),
    "candidates": ("make preferences for train.objective: cpo out of n-best translations", _add_candidates),
    "delta": ("put a delta onto its base, take it off, or make one from two models", _add_delta),
    "doctor": ("before a run: whether all hosts are ready, and how fast their network is", _add_doctor),
    "experiment": (
        "a grid of runs over one data plan: methods x seeds, tuned alike, compared in one table",
        _add_experiment,
    ),
    "plan": (
        "what fits on a cluster, and how long a step takes there; needs no weights and no GPU",
        _add_plan,
    ),
    "completion": ("print what lets bash, zsh or tcsh complete this command", _add_completion),
}
"""Name -> what it does, and what adds its arguments."""
