"""Stage translate: the test split through every system of the recipe. On every rank."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Literal

from transformers import PreTrainedTokenizerBase

from lander_ds.checkpoint.choice import chosen, warn_of_changes
from lander_ds.common.files import json_hash
from lander_ds.data.prepared import PreparedData
from lander_ds.data.tokens.tokenizer import load_tokenizer
from lander_ds.distributed import collectives, process_group
from lander_ds.distributed.start import Start
from lander_ds.inference.open import InferenceModel, open_for_inference
from lander_ds.inference.provenance import System, inputs_of, options_of, record_name
from lander_ds.inference.requests import requests_for
from lander_ds.inference.translate import Request, translate
from lander_ds.inference.translations import PartialTranslations
from lander_ds.stages.stage import Part, Result, Stage

logger = logging.getLogger(__name__)


def _parts(start: Start) -> list[Part]:
    """A part per system of `translate.systems`: training again does not make the untouched base translate again.

    Raises:
        ArtefactError: the data is not prepared, or the trained system is asked for and there is no checkpoint.
        ConfigError: a prompt and its translation may need more positions than the model has.
        DataError: a pair has no sentence to translate.
    """
    recipe, run = start.recipe, start.run
    data, models = PreparedData.load(run, recipe), _Models(start)
    # Systems of the same model come one after the other.
    systems = sorted(recipe.translate.systems, key=_model_of)
    trained = chosen(run.checkpoints, recipe.translate.checkpoint) if "trained" in systems else None
    if trained is not None and process_group.rank() == 0:
        warn_of_changes(trained.state, recipe, run, data.content_hash("train", "valid"))
    tokenizer = cache(lambda: load_tokenizer(recipe.model.path, recipe.model.trust_remote_code))
    # All before a model is loaded, which takes long, because not every request can be met.
    requests = cache(lambda system: requests_for(system, recipe, data, tokenizer()))

    def part(system: System) -> Part:
        options, inputs = options_of(recipe, system), inputs_of(start, data, system, trained)
        key = json_hash({"options": options, "inputs": inputs})
        return Part(
            record_name(system),
            options,
            inputs,
            lambda: _translate(start, tokenizer(), models.open(system), system, requests(system), key),
            prepare=lambda: requests(system),
        )

    return [part(system) for system in systems]


STAGE = Stage("translate", _parts)
run = STAGE.run


def _model_of(system: System) -> Literal["base", "trained"]:
    return "trained" if system == "trained" else "base"


class _Models:
    """One model in memory at a time; systems that are the untouched base share it."""

    def __init__(self, start: Start) -> None:
        self._start = start
        self._opened: dict[str, InferenceModel] = {}

    def open(self, system: System) -> InferenceModel:
        """The model of a system (collective)."""
        name = _model_of(system)
        if name not in self._opened:
            self._opened.clear()
            self._opened[name] = open_for_inference(self._start.recipe, self._start.run, name)
        return self._opened[name]


def _translate(
    start: Start,
    tokenizer: PreTrainedTokenizerBase,
    model: InferenceModel,
    system: System,
    requests: Mapping[str, Sequence[Request]],
    key: str,
) -> Result:
    """Translate what no earlier run has finished.

    Args:
        start: what runs.
        tokenizer: the model's.
        model: the system's.
        system: its name.
        requests: what it translates, by pair.
        key: hash of everything that the translations depend on.
    """
    recipe, directory = start.recipe, start.run.translations / system
    if start.force and process_group.rank() == 0:
        PartialTranslations(directory, key).discard()
    collectives.barrier()
    work = translate(model, tokenizer, requests, recipe.decoding, directory, key)
    rate = work.tokens / work.seconds
    logger.info("translate %s: %d sentences, %.1f tokens/s", system, work.sentences, rate)
    if work.truncated:
        logger.warning(
            "translate %s: %d of %d translations were cut short at translate.max_new_tokens=%d: raise it, unless the "
            "model does not come to an end anyway",
            *(system, work.truncated, work.sentences, recipe.decoding.max_new_tokens),
        )
    figures = {
        **({} if model.checkpoint is None else {"checkpoint": model.checkpoint}),
        "sentences": work.sentences,
        "tokens": work.tokens,
        "truncated": work.truncated,
        "tokens_per_second": round(rate, 1),
    }
    return Result([directory / f"{pair}.jsonl" for pair in requests], figures)
