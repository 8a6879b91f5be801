"""Proof that an export is the model that was trained: same logits in float32, same greedy translations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
)

from lander_ds.common import console
from lander_ds.common.errors import ModelError
from lander_ds.distributed.start import Start
from lander_ds.inference.open import open_for_inference

NEW_TOKENS = 24


def compare(
    start: Start,
    directory: Path,
    prompts: Mapping[str, Sequence[Sequence[int]]],
    generate: bool,
) -> dict[str, Any]:
    """Compare the export in `directory` with the newest checkpoint in float32 arithmetic on this process's device.

    Args:
        start: names the base, and the run directory in which the checkpoint lies.
        directory: an HF model directory that stage export wrote.
        prompts: token ids of prompts by pair.
        generate: compare greedy translations too.

    Returns: `max_logit_difference` (absolute; NaN where a logit is not finite), `max_logit` (largest absolute logit),
    `same_greedy` (None unless `generate`) and `sentences`.
    """
    recipe = start.recipe
    whole = replace(recipe.translate, weights="replicated", checkpoint=recipe.export.checkpoint)
    ours = open_for_inference(start, "trained", whole)
    exported = open_exported(directory, getattr(torch, recipe.model.dtype))
    # Both hold the weights in the type they were trained in; float32 arithmetic keeps rounding out of the comparison.
    ours.model.float()
    exported.to(ours.model.device).float().eval()
    # `generate` adds to the configuration that it is given what the model's own says (penalties, beams, suppressed or
    # forced tokens, sampling), and only an export comes with the base's generation_config.json.
    ours.model.generation_config = exported.generation_config = GenerationConfig()
    routed = exported.config.model_type == "lander"
    differences, largest, same = [0.0], [0.0], True
    greedy = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    cases = [(pair, prompt) for pair, batch in prompts.items() for prompt in batch]
    with console.progress(f"verify {directory.name} export", len(cases)) as bar:
        for pair, prompt in cases:
            arguments = {"pair": pair} if routed else {}
            ids = torch.tensor([list(prompt)], device=ours.model.device)
            options = {"attention_mask": torch.ones_like(ids), "generation_config": greedy}
            with torch.no_grad(), ours.pair(pair):
                expected = ours.model(ids).logits
                logits = exported(ids, **arguments).logits
                if generate:
                    translation = ours.model.generate(ids, **options)
                    same = same and torch.equal(translation, exported.generate(ids, **options, **arguments))
            differences.append(float((logits - expected).abs().max()))
            largest.append(float(expected.abs().max()))
            bar.advance(1, pair)
    return {
        # Unlike Python's, torch's maximum of numbers with a NaN among them is NaN.
        "max_logit_difference": float(torch.tensor(differences, dtype=torch.float64).max()),
        "max_logit": float(torch.tensor(largest, dtype=torch.float64).max()),
        "same_greedy": same if generate else None,
        "sentences": len(cases),
    }


def open_exported(directory: Path, dtype: torch.dtype) -> Any:
    """A dense or routed export as transformers opens it, a multimodal one by its own class.

    Raises:
        ModelError: transformers has no class for it.
    """
    config = AutoConfig.from_pretrained(directory, trust_remote_code=True)
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in getattr(
        config, "auto_map", {}
    ):
        opener: Any = AutoModelForCausalLM
    elif type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        opener = AutoModelForImageTextToText
    else:
        raise ModelError(
            f"{directory}: transformers opens {config.model_type} neither as a causal language model nor as an "
            "image-text-to-text model, so this export cannot be compared: set export.verify: 0"
        )
    return opener.from_pretrained(directory, trust_remote_code=True, dtype=dtype)
