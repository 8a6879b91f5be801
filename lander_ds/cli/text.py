"""`lander translate --input`: text from a file or a pipe, without references."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from lander_ds.checkpoint.choice import chosen
from lander_ds.cli.arguments import check_output
from lander_ds.cli.stages import process_group_for
from lander_ds.common import launch
from lander_ds.common.errors import ConfigError
from lander_ds.common.files import file_hash, json_hash, write_text
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.data_consistency import evaluated_pairs, is_pair
from lander_ds.config.recipe import Recipe
from lander_ds.data.sets import training_shots
from lander_ds.data.sources.corpus import resolve
from lander_ds.data.tokens.prompt import check_prompt, shots_for
from lander_ds.data.tokens.prompt_format import prompt_format
from lander_ds.data.tokens.text_encoder import TextEncoder
from lander_ds.data.tokens.tokenizer import load_tokenizer
from lander_ds.distributed import collectives, process_group
from lander_ds.distributed.start import Start
from lander_ds.inference.decoding import end_tokens, line_end_tokens, split_stop
from lander_ds.inference.open import (
    InferenceModel,
    generation_config,
    open_directory,
    open_for_inference,
    positions_in,
)
from lander_ds.inference.provenance import decoding_options
from lander_ds.inference.segments import (
    STANDARD,
    Line,
    Segment,
    is_json_lines,
    lines_of,
    read_segments,
    written,
)
from lander_ds.inference.translate import Request, translate
from lander_ds.inference.translations import read_translations
from lander_ds.preflight.recipe import load_checked
from lander_ds.stages.stage import alone
from lander_ds.training import preemption

logger = logging.getLogger(__name__)


def run(arguments: argparse.Namespace) -> None:
    """Translate, on every rank."""
    preemption.leave_at_once()
    recipe = _recipe(arguments)
    _check(recipe, arguments)
    json_lines = arguments.jsonl or is_json_lines(arguments.input)
    segments = read_segments(arguments.input, json_lines)
    start = Start(recipe, RunDirectory(recipe.run_dir), arguments.force)
    facts = {"input": arguments.input, "output": arguments.output, "pair": arguments.pair}
    with process_group_for(start, "translate", facts):
        _run(start, arguments, segments)


def _recipe(arguments: argparse.Namespace) -> Recipe:
    """That of `--recipe` or `--run`, decoding with as many beams as translations are wanted, if it searches for them."""
    path, overrides = arguments.recipe, list(arguments.overrides)
    if arguments.run is not None:
        path = RunDirectory(arguments.run).recipe
        overrides.insert(0, f"run_dir={json.dumps(str(arguments.run))}")
    if arguments.model is not None:
        overrides.append(f"model.path={json.dumps(str(arguments.model))}")
    recipe = load_checked(path, overrides, "text")
    if recipe.translate.sampling.temperature:
        return recipe
    beams = max(recipe.translate.beams, arguments.n_best)
    return replace(recipe, translate=replace(recipe.translate, beams=beams))


def _check(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """Refuse what cannot be translated, or could not be written."""
    pair, known = arguments.pair, evaluated_pairs(recipe)
    if not is_pair(pair):
        raise ConfigError(f"--pair {pair}: is no pair: write source-target, for example {known[0]}")
    if pair not in known and not arguments.untrained:
        raise ConfigError(
            f"--pair {pair}: the recipe has {', '.join(known)}; add --untrained to translate in a direction that it was not "
            "trained for"
        )
    check_prompt(recipe.data.prompt, [pair])
    if launch.world_size() > 1 and STANDARD in (arguments.input, arguments.output or STANDARD):
        raise ConfigError("several ranks need files: name them with --input and --output")
    if arguments.output is not None:
        check_output(Path(arguments.output))


def _run(start: Start, arguments: argparse.Namespace, segments: Sequence[Segment]) -> None:
    recipe, pair = start.recipe, arguments.pair
    tokenizer = load_tokenizer(recipe.model.path, recipe.model.trust_remote_code)
    lines = lines_of(segments, recipe.data.prompt.context)
    requests = _requests(recipe, pair, arguments.input, segments, lines, tokenizer)
    if arguments.prompts:
        if process_group.rank() == 0:
            _put(arguments.output, _prompts(recipe, segments, lines, requests, tokenizer))
        return
    key = json_hash([_depends_on(start, arguments), [[r.id, r.prompt, r.stop] for r in requests.values()]])
    with _work_directory(arguments.output) as work:
        if arguments.force and process_group.rank() == 0:
            shutil.rmtree(work, ignore_errors=True)
        collectives.barrier()
        if requests:
            model = _open(start, arguments)
            done = translate(
                model, tokenizer, {pair: [*requests.values()]}, recipe.decoding, work, key, arguments.n_best
            )
            logger.info("%d sentences, %.1f tokens/s", done.sentences, done.tokens / done.seconds)
            if done.truncated and process_group.rank() == 0:
                logger.warning(
                    "%d translations were cut short at translate.max_new_tokens=%d: raise it with --set",
                    *(done.truncated, recipe.decoding.max_new_tokens),
                )
        if process_group.rank() == 0:
            of = {t.id: t for t in read_translations(work / f"{pair}.jsonl")} if requests else {}
            translations = {line: of[request.id] for line, request in requests.items()}
            text = written(segments, lines, translations, n_best=arguments.n_best > 1)
            _put(arguments.output, text)
            shutil.rmtree(work, ignore_errors=True)
    collectives.barrier()


def _put(output: str | None, text: str) -> None:
    if output in (None, STANDARD):
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        write_text(Path(output), text)


def _prompts(
    recipe: Recipe,
    segments: Sequence[Segment],
    lines: Sequence[Sequence[Line]],
    requests: Mapping[Line, Request],
    tokenizer: PreTrainedTokenizerBase,
) -> str:
    """What another program needs to translate the same lines as this one, as JSON."""
    # Every request of a pair ends alike.
    stop, special = split_stop(tokenizer, next((request.stop for request in requests.values()), ""))
    ends = end_tokens(generation_config(Path(recipe.model.path)), tokenizer)
    asked = [(number, requests[line]) for number, line in _asked(segments, lines)]
    content = {
        "end_ids": list(dict.fromkeys([*ends, *special, *line_end_tokens(tokenizer)])),
        "stop": stop,
        "prompts": [
            {
                "line": number,
                "src": request.src,
                "ids": list(request.prompt),
                "tokens": tokenizer.convert_ids_to_tokens(list(request.prompt)),
            }
            for number, request in asked
        ],
    }
    return json.dumps(content, ensure_ascii=False) + "\n"


@contextmanager
def _work_directory(output: str | None) -> Iterator[Path]:
    """Where finished sentences lie until all are: beside the output, so that an interrupted translation goes on."""
    if output in (None, STANDARD):
        with tempfile.TemporaryDirectory(prefix="lander-") as temporary:
            yield Path(temporary)
        return
    path = Path(f"{output}.parts")
    with alone(Path(f"{output}.lock"), f"the translation {output}", collective=True):
        yield path


def _asked(segments: Sequence[Segment], lines: Sequence[Sequence[Line]]) -> Iterator[tuple[int, Line]]:
    """Every line that is not empty, with the number of its segment's."""
    for segment, own in zip(segments, lines, strict=True):
        for line in filter(lambda line: line.text, own):
            yield segment.line, line


def _requests(
    recipe: Recipe,
    pair: str,
    source: str,
    segments: Sequence[Segment],
    lines: Sequence[Sequence[Line]],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[Line, Request]:
    """One per line of text that is not empty; what stands in the input several times is translated once.

    Raises:
        ConfigError: a line is too long for the model.
        DataError: the examples of the training's prompts cannot be had.
    """
    config = recipe.data.prompt
    examples = training_shots(recipe, resolve(recipe.data)) if config.shots else {}
    asked: dict[Line, int] = {}
    for number, line in _asked(segments, lines):
        asked.setdefault(line, number)
    shots, form = examples.get(pair, []), prompt_format(config, tokenizer)
    prompts = TextEncoder(tokenizer).prompts(
        [
            form.prompt(pair, line.text, shots_for(shots, (line.text, ""), config.shots), line.context)
            for line in asked
        ]
    )
    positions = positions_in(recipe.model)
    for prompt, number in zip(prompts, asked.values(), strict=True):
        if positions is not None and len(prompt) >= positions:
            raise ConfigError(
                f"--input {source}, line {number}: its prompt has {len(prompt)} tokens, and the model reads "
                f"{positions}: divide the line"
            )
    stop = form.stop(pair, len(shots))
    return {
        line: Request(str(index), line.text, "", tuple(prompt), stop)
        for index, (line, prompt) in enumerate(zip(asked, prompts, strict=True))
    }


def _open(start: Start, arguments: argparse.Namespace) -> InferenceModel:
    if arguments.model is not None:
        return open_directory(start.recipe.model)
    return open_for_inference(start, arguments.system)


def _depends_on(start: Start, arguments: argparse.Namespace) -> Mapping[str, Any]:
    """Everything that translations of the same prompts depend on."""
    recipe = start.recipe
    own = Path(recipe.model.path) / GENERATION_CONFIG_NAME
    depends: dict[str, Any] = {
        **decoding_options(recipe),
        "dtype": recipe.model.dtype,
        "pair": arguments.pair,
        "n_best": arguments.n_best,
        "weights": start.base_fingerprint,
        "generation config": file_hash(own) if own.exists() else None,
    }
    if arguments.model is None and arguments.system == "trained":
        state = chosen(start.run.checkpoints, recipe.translate.checkpoint).state
        depends["checkpoint"] = json_hash(dict(state))
    return depends
