"""What folding costs: BLEU and chrF of the folded export and of the routed model on the same sentences."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lander_ds.common import console
from lander_ds.config.recipe import Recipe
from lander_ds.config.schema.results import ScoreConfig
from lander_ds.config.schema.types import Split
from lander_ds.data.prepared import PreparedData
from lander_ds.data.tokens.languages import split_pair
from lander_ds.data.tokens.tokenizer import load_tokenizer
from lander_ds.distributed.start import Start
from lander_ds.evaluation.metrics import bleu_tokenizer, evaluate
from lander_ds.export.fold import MEAN
from lander_ds.export.verify import open_exported
from lander_ds.inference.decoding import Decoder
from lander_ds.inference.open import InferenceModel, open_for_inference
from lander_ds.inference.requests import requests_for
from lander_ds.inference.translate import Request

logger = logging.getLogger(__name__)

SPLITS: tuple[Split, ...] = ("test", "valid")
"""Where sentences may come from, the split of stage translate first."""


def folding_loss(start: Start, data: PreparedData, folds: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Translate `export.fold_sentences` sentences of each folded pair with both models, as stage translate would.

    Args:
        start: names the base, and the run directory in which the checkpoint lies.
        data: prepared data.
        folds: pair, or `mean` (all pairs) -> its export.

    Returns: name of the fold -> pair -> `split`, `sentences`, and for `bleu` and `chrf` `routed`, `folded` and `p` of the
        paired bootstrap; `signatures`. Pairs without test or validation data are left out.
    """
    recipe = start.recipe
    tokenizer = load_tokenizer(recipe.model.path, recipe.model.trust_remote_code)
    pairs = [pair for pair in recipe.data.pairs if MEAN in folds or pair in folds]
    requests = {pair: own for pair in pairs if (own := _requests(recipe, data, tokenizer, pair)) is not None}
    whole = replace(recipe.translate, weights="replicated", checkpoint=recipe.export.checkpoint)
    routed = open_for_inference(start, "trained", whole)
    ours = {
        pair: _translate(routed, tokenizer, recipe, pair, wanted) for pair, (_, wanted) in requests.items()
    }
    device, generation = routed.model.device, routed.model.generation_config
    del routed
    losses: dict[str, dict[str, Any]] = {}
    for fold, directory in folds.items():
        exported = open_exported(directory, getattr(torch, recipe.model.dtype))
        # Only exports come with the base's generation_config.json; both decode under one configuration.
        exported.generation_config = generation
        folded = InferenceModel(exported.to(device).eval())
        losses[fold] = {}
        for pair, (split, wanted) in requests.items():
            if fold in (pair, MEAN):
                theirs = _translate(folded, tokenizer, recipe, pair, wanted)
                losses[fold][pair] = _compare(recipe, pair, split, wanted, ours[pair], theirs)
        for pair, loss in losses[fold].items():
            logger.info(
                "dense-%s: %s BLEU %.2f (routed %.2f), chrF %.2f (routed %.2f) on %d sentences",
                *(fold, pair, loss["bleu"]["folded"], loss["bleu"]["routed"]),
                *(loss["chrf"]["folded"], loss["chrf"]["routed"], loss["sentences"]),
            )
    return losses


def _requests(
    recipe: Recipe, data: PreparedData, tokenizer: PreTrainedTokenizerBase, pair: str
) -> tuple[str, list[Request]] | None:
    splits = [split for split in (recipe.translate.split, *SPLITS) if len(data.split(split).get(pair, ()))]
    if not splits:
        logger.warning("%s has no test or validation data: what folding costs it is not measured", pair)
        return None
    limited = replace(recipe.translate, split=splits[0], limit=recipe.export.fold_sentences)
    only = replace(recipe, translate=limited, data=replace(recipe.data, pairs=(pair,)))
    return splits[0], requests_for("trained", only, data, tokenizer)[pair]


def _translate(
    model: InferenceModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    pair: str,
    requests: Sequence[Request],
) -> list[str]:
    """Hypotheses in the order of the requests; sentences of like length are decoded together."""
    decoder, size = Decoder(model.model, tokenizer, recipe.decoding), recipe.translate.batch_size
    order = sorted(range(len(requests)), key=lambda index: -len(requests[index].prompt))
    texts = [""] * len(requests)
    with model.pair(pair), console.progress(f"measure folding ({pair})", len(requests)) as bar:
        prefix = decoder.shared_prefix([request.prompt for request in requests])
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            prompts = [requests[index].prompt for index in batch]
            hypotheses = decoder.decode(prompts, prefix, requests[0].stop)
            for index, hypothesis in zip(batch, hypotheses, strict=True):
                texts[index] = hypothesis.text
            bar.advance(len(batch))
    return texts


def _compare(
    recipe: Recipe, pair: str, split: str, requests: Sequence[Request], routed: list[str], folded: list[str]
) -> dict[str, Any]:
    config: ScoreConfig = recipe.score
    tokenizer = bleu_tokenizer(split_pair(pair)[1], config.tokenizers)
    references = [request.ref for request in requests]
    systems = {"routed": routed, "folded": folded}
    estimates, signatures = evaluate(references, systems, tokenizer, config, recipe.seed)
    figures = {
        metric: {
            "routed": estimates["routed"][metric].score,
            "folded": estimates["folded"][metric].score,
            "difference": estimates["folded"][metric].score - estimates["routed"][metric].score,
            "p": estimates["folded"][metric].p,
        }
        for metric in ("bleu", "chrf")
    }
    named = {metric: signatures[metric] for metric in figures}
    return {"split": split, "sentences": len(requests), **figures, "signatures": named}
