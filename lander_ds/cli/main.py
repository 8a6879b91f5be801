"""The command line: `lander STAGE --recipe FILE`, and a few commands around the stages.

One process: `lander STAGE ...`. Many: `deepspeed [launcher flags] --module lander_ds STAGE ...`, which starts
the same `main` on every rank. The recipe and its DeepSpeed JSON are checked before a stage is imported.
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from lander_ds.cli import delta, doctor, plan
from lander_ds.common import console
from lander_ds.common.errors import DiskFull, LanderError
from lander_ds.common.files import write_text
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.loading import dump_recipe, read_recipe
from lander_ds.config.recipe import Recipe
from lander_ds.training import preemption
from lander_ds.version import __version__

logger = logging.getLogger(__name__)

STAGES: dict[str, str] = {
    "prepare": "corpora -> checked, filtered and tokenised sentence pairs",
    "detect": "base model + sentence pairs -> awareness.safetensors",
    "select": "awareness -> selection.safetensors: layers and banks",
    "train": "base model + selection + sentence pairs -> checkpoints/",
    "translate": "models + test sentences -> translations/",
    "score": "translations -> scores.json: BLEU, chrF, TER, significance",
    "export": "checkpoint -> Hugging Face directories under export/",
    "report": "everything -> report.html",
}
"""Name -> what it reads and writes, in the order in which `all` runs them."""

OTHER_COMMANDS: dict[str, str] = {
    "all": "every stage, in order, in one process group",
    "config": "check, resolve and explain recipes",
    "summary": "print the figures of a run",
    "tokenizer": "train a SentencePiece tokenizer on a recipe's corpora",
    "delta": delta.SUMMARY,
    "doctor": doctor.SUMMARY,
    "plan": plan.SUMMARY,
}

COLLECTIVE_STAGES = ("detect", "train", "translate")
"""Stages that every rank works on, and that need a process group even on one."""

WAIT_SECONDS = 24 * 3600.0
"""How long ranks wait for rank 0 where there are stages that it does alone, such as reading large corpora."""

HEAD_START_SECONDS = 3.0
"""How much longer than rank 0 the other ranks take to fail: launchers look at their processes every second."""

GRACE_SECONDS = 5.0
"""How long a rank that lost its connection to another lets the launcher end it, before it complains."""

INTERRUPTED = 130

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

`lander COMMAND --help` says more. Exit codes: 0 done, 2 wrong input, 1 a defect, 74 the last checkpoint could not be
written, 75 asked to stop (SIGTERM, SIGUSR1) and saved, 76 a rank hung, 130 interrupted. After 75 and 76, and after a
machine failed, the same command with --auto-resume goes on."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code of the process.

    Args:
        argv: the arguments without the program's name; default those of the process.
    """
    arguments = _parser().parse_args(_without_local_rank(sys.argv[1:] if argv is None else argv))
    console.setup_logging(getattr(arguments, "verbose", False))
    try:
        arguments.command(arguments)
    except LanderError as error:
        _report(error)
        return _leave(error.exit_code)
    except KeyboardInterrupt:
        if console.rank() == 0:
            sys.stderr.write("interrupted\n")
        return _leave(INTERRUPTED)
    except BrokenPipeError:
        # The reader of a pipe, such as `head`, has gone: Python must not try to flush what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _leave(1)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            _report(
                DiskFull(f"{error}: make room, then start the same command again (train with --auto-resume)")
            )
            return _leave(DiskFull.exit_code)
        if ranks() == 1:
            raise
        if "by peer" in str(error):
            # Another rank failed first and says why; the launcher is about to end this one.
            time.sleep(GRACE_SECONDS)
        traceback.print_exc()
        return _leave(1)
    return 0


def ranks() -> int:
    """Number of processes that the launcher started; 1 without a launcher."""
    names = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
    return int(next((os.environ[name] for name in names if os.environ.get(name)), "1"))


def _report(error: LanderError) -> None:
    """Tell what is wrong: rank 0 at once in full, the others their first line.

    They mostly fail like rank 0, and the launcher then ends them. A rank that is left alone tells the rest.
    """
    if console.rank() == 0:
        sys.stderr.write(f"{error.label}: {error}\n")
        return
    first, _, rest = str(error).partition("\n")
    logger.error("rank %d stopped: %s", console.rank(), first)
    time.sleep(HEAD_START_SECONDS)
    if rest:
        logger.error("rank %d stopped, in full: %s", console.rank(), error)


def _leave(code: int) -> int:
    """The exit code; under a launcher the process ends here and now.

    Other ranks may wait for this one in a collective, which can keep an orderly exit from ever finishing. The
    launcher ends them as soon as it sees this process fail.
    """
    if ranks() > 1:
        _end(code)
    return code


def _end(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _without_local_rank(argv: Sequence[str]) -> list[str]:
    """`argv` without the `--local_rank=N` that DeepSpeed's launcher adds (LOCAL_RANK says the same)."""
    return [argument for argument in argv if not argument.startswith(("--local_rank=", "--local-rank="))]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "lander",
        usage="lander [-h] [--version] COMMAND ...",
        description=_DESCRIPTION.format(stages=_listing(STAGES), others=_listing(OTHER_COMMANDS)),
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lander-ds {__version__}")
    commands = parser.add_subparsers(prog="lander", metavar="COMMAND", required=True, help=argparse.SUPPRESS)
    for stage in (*STAGES, "all"):
        command = _command(commands, stage, f"lander {stage} --recipe recipes/demo.yaml{_HINTS[stage]}")
        _add_recipe(command)
        command.add_argument(
            "--force", action="store_true", help="run again although the outputs are up to date"
        )
        if stage in ("train", "all"):
            command.add_argument(
                "--auto-resume",
                action="store_true",
                help="go on from the newest whole checkpoint, if there is one",
            )
        command.set_defaults(command=_run_stages, stage=stage)

    command = _command(commands, "config", "lander config --recipe my.yaml --set seed=2 --dump")
    _add_recipe(command, required=False)
    command.add_argument(
        "--dump", action="store_true", help="print the recipe with every default and override"
    )
    command.add_argument(
        "--explain",
        nargs="?",
        const="",
        metavar="KEY",
        help="print type, default and meaning of KEY, or of every key",
    )
    command.add_argument("--markdown", action="store_true", help="with --explain: as a Markdown page")
    command.set_defaults(command=_config, parser=command)

    command = _command(commands, "summary", "lander summary runs/demo --json")
    command.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="directory of the run")
    command.add_argument("--json", action="store_true", help="as JSON, for programs")
    command.set_defaults(command=_summary)

    example = "lander tokenizer --recipe my.yaml --out models/my-tokenizer --vocab-size 8000"
    command = _command(commands, "tokenizer", example)
    _add_recipe(command)
    command.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where the tokenizer is written"
    )
    command.add_argument("--vocab-size", type=int, required=True, metavar="N", help="number of pieces")
    command.add_argument(
        "--model-type", choices=("unigram", "bpe"), default="unigram", help="default: unigram"
    )
    command.add_argument(
        "--character-coverage",
        type=float,
        default=0.9995,
        metavar="SHARE",
        help="share of characters with a piece",
    )
    command.set_defaults(command=_tokenizer)

    delta.add_arguments(
        _command(commands, "delta", "lander delta apply models/base runs/demo/export/delta models/mine")
    )
    command = _command(commands, "doctor", "lander doctor --recipe recipes/demo.yaml --hostfile hosts")
    _add_recipe(command)
    doctor.add_arguments(command)
    example = "lander plan --recipe recipes/7b.yaml --cluster examples/clusters/8xa100-80g.yaml"
    command = _command(commands, "plan", example)
    _add_recipe(command, required=False)
    plan.add_arguments(command, lambda arguments: _load(arguments, "plan"))
    return parser


_HINTS = {
    "prepare": " --set data.workers=8",
    "detect": " --set detect.examples=64",
    "select": " --set select.banks.rho=0.7",
    "train": " --set train.steps=500 --set train.lr.general=1e-4",
    "translate": " --set translate.beams=4",
    "score": " --set score.ter=false",
    "export": " --set 'export.formats=[dense]'",
    "report": " --force",
    "all": " --set run_dir=runs/mine",
}


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, example: str
) -> argparse.ArgumentParser:
    text = {**STAGES, **OTHER_COMMANDS}[name]
    parser = commands.add_parser(
        name,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--verbose", action="store_true", help="also log details")
    return parser


def _listing(commands: dict[str, str]) -> str:
    return "\n".join(f"  {name:9}  {text}" for name, text in commands.items())


def _add_recipe(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument("--recipe", type=Path, required=required, metavar="FILE", help="the recipe (YAML)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="change a key, e.g. train.lr.general=1e-4 or data.corpora.0.limit=100; may be repeated",
    )


def _load(arguments: argparse.Namespace, stage: str | None) -> Recipe:
    """The recipe, once it and its DeepSpeed JSON are known to be sound for `stage`."""
    from lander_ds.preflight.recipe import check_recipe

    recipe, document = read_recipe(arguments.recipe, arguments.overrides)
    check_recipe(recipe, stage, document)
    if stage != "tokenizer":
        from lander_ds.config.deepspeed_json import check_deepspeed_json

        check_deepspeed_json(recipe)
    return recipe


def _run_stages(arguments: argparse.Namespace) -> None:
    stage = arguments.stage
    preemption.leave_at_once()
    recipe = _load(arguments, stage)
    run = RunDirectory(recipe.run_dir)
    from lander_ds.distributed import agreement, process_group
    from lander_ds.preflight.facts import collect

    flags = {name: getattr(arguments, name, False) for name in ("force", "auto_resume")}
    facts = collect(recipe, {"stage": stage, **flags, "ranks": ranks()}) if ranks() > 1 else {}
    with agreement.alike(facts, ranks()):
        if stage in COLLECTIVE_STAGES:
            process_group.start()
        elif stage == "all" or ranks() > 1:
            process_group.start(WAIT_SECONDS)
    try:
        if process_group.rank() == 0:
            write_text(run.recipe, dump_recipe(recipe))
        for name in STAGES if stage == "all" else [stage]:
            more = {"auto_resume": arguments.auto_resume} if name == "train" else {}
            import_module(f"lander_ds.stages.{name}").run(recipe, run, force=arguments.force, **more)
            process_group.free_memory()
    except BaseException:
        # Leaving the group in good order would wait for ranks that wait for this one.
        if ranks() == 1:
            process_group.stop()
        raise
    process_group.stop()


def _config(arguments: argparse.Namespace) -> None:
    if arguments.explain is not None:
        from lander_ds.config.explain import as_markdown, as_text, explain

        keys = explain(arguments.explain)
        console.write_line(as_markdown(keys) if arguments.markdown else as_text(keys))
        return
    if arguments.recipe is None:
        arguments.parser.error("--recipe FILE or --explain is needed")
    recipe = _load(arguments, None)
    if arguments.dump:
        console.write_line(dump_recipe(recipe).rstrip("\n"))
    else:
        console.write_line(f"{arguments.recipe}: sound; --dump prints it with every default")


def _summary(arguments: argparse.Namespace) -> None:
    from lander_ds.report.summary import summarise, summary_table

    figures = summarise(RunDirectory(arguments.run_dir))
    if arguments.json:
        console.write_line(json.dumps(figures, indent=2, ensure_ascii=False))
    else:
        console.stdout.print(summary_table(figures))


def _tokenizer(arguments: argparse.Namespace) -> None:
    from lander_ds.data.tokens.sentencepiece_training import train_tokenizer

    recipe = _load(arguments, "tokenizer")
    train_tokenizer(
        recipe, arguments.out, arguments.vocab_size, arguments.model_type, arguments.character_coverage
    )
