"""Stage translate: the test split through every system of the recipe. On every rank."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from lander_ds.common.files import json_hash
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.recipe import Recipe
from lander_ds.data.prepared import PreparedData
from lander_ds.data.tokens.tokenizer import load_tokenizer
from lander_ds.distributed import collectives, process_group
from lander_ds.inference.open import open_for_inference
from lander_ds.inference.provenance import System, inputs_of, is_up_to_date, options_of, record_name
from lander_ds.inference.requests import requests_for
from lander_ds.inference.translate import InferenceModel, Request, translate
from lander_ds.inference.translations import PartialTranslations

logger = logging.getLogger(__name__)


def run(recipe: Recipe, run: RunDirectory, force: bool = False) -> None:
    """Translate with every system in `translate.systems` that is not up to date.

    Raises:
        ArtefactError: the data is not prepared, or the trained system is asked for and there is no checkpoint.
        DataError: a pair has no sentence to translate.
    """
    data = PreparedData.load(run, recipe)
    systems = recipe.translate.systems
    current = [system for system in systems if not force and is_up_to_date(recipe, run, data, system)]
    stale = [system for system in systems if system not in collectives.from_rank_zero(current)]
    for system in current:
        logger.info("translate %s: up to date", system)
    if not stale:
        return
    tokenizer = load_tokenizer(recipe.model.path, recipe.model.trust_remote_code)
    # Before a model is loaded, which takes long, because not every request can be met.
    requests = {system: requests_for(system, recipe, data, tokenizer) for system in stale}
    # The systems that are the untouched base share one loaded model; only one model is in memory at a time.
    if untouched := [system for system in stale if system != "trained"]:
        model = open_for_inference(recipe, run, "base")
        for system in untouched:
            _translate(recipe, run, data, tokenizer, model, system, requests[system], force)
        del model
    if "trained" in stale:
        model = open_for_inference(recipe, run, "trained")
        _translate(recipe, run, data, tokenizer, model, "trained", requests["trained"], force)


def _translate(
    recipe: Recipe,
    run: RunDirectory,
    data: PreparedData,
    tokenizer: PreTrainedTokenizerBase,
    model: InferenceModel,
    system: System,
    requests: Mapping[str, Sequence[Request]],
    force: bool,
) -> None:
    options, inputs = options_of(recipe, system), inputs_of(recipe, run, data, system)
    directory, key = run.translations / system, json_hash({"options": options, "inputs": inputs})
    if force and process_group.rank() == 0:
        PartialTranslations(directory, key).discard()
    collectives.barrier()
    work = translate(model, tokenizer, requests, recipe.translate, directory, key)
    if process_group.rank() == 0:
        rate = work.tokens / work.seconds
        logger.info("translate %s: %d sentences, %.1f tokens/s", system, work.sentences, rate)
        outputs = [directory / f"{pair}.jsonl" for pair in requests]
        extra = {"sentences": work.sentences, "tokens": work.tokens, "tokens_per_second": round(rate, 1)}
        run.record(record_name(system), options, inputs, outputs, work.seconds, extra)
    collectives.barrier()
