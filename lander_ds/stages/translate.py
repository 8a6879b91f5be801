"""Stage translate: the test split and the named test sets through every system of the recipe. On every rank."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lander_ds.checkpoint.choice import chosen, warn_of_changes
from lander_ds.common.files import json_hash, write_json
from lander_ds.config.schema.types import System
from lander_ds.config.systems import model_of, set_systems, shows_examples, used_systems
from lander_ds.data.prepared import NamedSet, PreparedData
from lander_ds.data.tokens.languages import split_pair
from lander_ds.data.tokens.tokenizer import load_tokenizer
from lander_ds.distributed import collectives, process_group
from lander_ds.distributed.start import Start
from lander_ds.inference.losses import LOSSES, text_losses
from lander_ds.inference.open import InferenceModel, open_for_inference
from lander_ds.inference.provenance import inputs_of, options_of, record_name
from lander_ds.inference.requests import requests_for, requests_for_set
from lander_ds.inference.translate import Request, translate
from lander_ds.inference.translations import PartialTranslations
from lander_ds.stages.stage import Part, Result, Stage

logger = logging.getLogger(__name__)


def _parts(start: Start) -> list[Part]:
    """A part per system and per test set: training again does not make the untouched base translate
    again, and another set not the others.

    Raises:
        ArtefactError: the data or a test set is not prepared, or the trained system is asked for and there is no checkpoint.
        ConfigError: a prompt and its translation may need more positions than the model has.
        DataError: a pair has no sentence to translate.
    """
    recipe, run = start.recipe, start.run
    data, models = PreparedData.load(run, recipe), _Models(start)
    # Systems of the same model come one after the other.
    systems = sorted(used_systems(recipe), key=model_of)
    is_trained = "trained" in map(model_of, systems)
    trained = chosen(run.checkpoints, recipe.translate.checkpoint) if is_trained else None
    if trained is not None and process_group.rank() == 0:
        warn_of_changes(trained.state, recipe, run, data.content_hash("train", "valid"))
    tokenizer = cache(lambda: load_tokenizer(recipe.model.path, recipe.model.trust_remote_code))

    def part(system: System, test_set: NamedSet | None) -> Part:
        options = options_of(recipe, system, test_set)
        inputs = inputs_of(start, data, system, trained, test_set)
        key = json_hash({"options": options, "inputs": inputs})

        # Before a model is loaded, which takes long, because not every request can be met.
        @cache
        def requests() -> dict[str, list[Request]]:
            if test_set is None:
                return requests_for(system, recipe, data, tokenizer())
            return requests_for_set(system, recipe, data, test_set, tokenizer())

        def body() -> Result:
            model, name = models.open(system), None if test_set is None else test_set.name
            return _translate(start, tokenizer(), model, system, name, requests(), key)

        name = record_name(system, None if test_set is None else test_set.name)
        return Part(name, options, inputs, body, prepare=requests)

    sets = [NamedSet.load(run, recipe, name) for name in recipe.evaluate.sets]

    parts = []
    for system in systems:
        if system in recipe.translate.systems:
            parts.append(part(system, None))
        if system in set_systems(recipe):
            parts += [part(system, one) for one in sets]
    return parts


STAGE = Stage("translate", _parts)
run = STAGE.run


class _Models:
    """One model in memory at a time; systems that are the same share it."""

    def __init__(self, start: Start) -> None:
        self._start = start
        self._opened: dict[str, InferenceModel] = {}

    def open(self, system: System) -> InferenceModel:
        """The model of a system (collective)."""
        name = model_of(system)
        if name not in self._opened:
            self._opened.clear()
            self._opened[name] = open_for_inference(self._start, name)
        return self._opened[name]


def _translate(
    start: Start,
    tokenizer: PreTrainedTokenizerBase,
    model: InferenceModel,
    system: System,
    test_set: str | None,
    requests: Mapping[str, Sequence[Request]],
    key: str,
) -> Result:
    """Translate what no earlier run has finished.

    Args:
        start: what runs.
        tokenizer: the model's.
        model: the system's.
        system: its name.
        test_set: name of the test set that is translated.
        requests: what it translates, by pair.
        key: hash of everything that the translations depend on.
    """
    recipe, directory = start.recipe, start.run.translations_of(system, test_set)
    what = system if test_set is None else f"{system} {test_set}"
    if start.force and process_group.rank() == 0:
        PartialTranslations(directory, key).discard()
    collectives.barrier()
    outputs = [directory / f"{pair}.jsonl" for pair in requests]
    if test_set is not None and not shows_examples(system):
        # First: what is translated can be gone on with, and this takes little time.
        _measure(model, tokenizer, requests, recipe.translate.weights == "sharded", directory / LOSSES)
        outputs.append(directory / LOSSES)
    work = translate(model, tokenizer, requests, recipe.decoding, directory, key)
    rate = work.tokens / work.seconds
    logger.info("translate %s: %d sentences, %.1f tokens/s", what, work.sentences, rate)
    if work.truncated:
        logger.warning(
            "translate %s: %d of %d translations were cut short at translate.max_new_tokens=%d: raise it, unless the "
            "model does not come to an end anyway",
            *(what, work.truncated, work.sentences, recipe.decoding.max_new_tokens),
        )
    figures = {
        **({} if model.checkpoint is None else {"checkpoint": model.checkpoint}),
        "sentences": work.sentences,
        "tokens": work.tokens,
        "truncated": work.truncated,
        "tokens_per_second": round(rate, 1),
    }
    return Result(outputs, figures)


def _measure(
    model: InferenceModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Mapping[str, Sequence[Request]],
    sharded: bool,
    path: Path,
) -> None:
    """Write the losses of the references as plain text, each once per target language."""
    texts: dict[str, dict[str, None]] = {}
    for pair, of_pair in requests.items():
        texts.setdefault(split_pair(pair)[1], {}).update(dict.fromkeys(request.ref for request in of_pair))
    losses = text_losses(model, tokenizer, {lang: list(of) for lang, of in texts.items()}, sharded)
    if process_group.rank() == 0:
        write_json(path, {language: asdict(loss) for language, loss in losses.items()})
