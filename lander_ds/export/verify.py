"""Proof that an export is the model that was trained: same logits in float32, same greedy translations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from lander_ds.common import console
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.recipe import Recipe
from lander_ds.inference.open import open_for_inference

NEW_TOKENS = 24


def compare(
    recipe: Recipe,
    run: RunDirectory,
    directory: Path,
    prompts: Mapping[str, Sequence[Sequence[int]]],
    generate: bool,
) -> dict[str, Any]:
    """Compare the export in `directory` with the newest checkpoint in float32 arithmetic on this process's device.

    Args:
        recipe: the recipe.
        run: where the checkpoint lies.
        directory: an HF model directory that stage export wrote.
        prompts: token ids of prompts by pair.
        generate: compare greedy translations too.

    Returns: `max_logit_difference` (absolute), `max_logit` (largest absolute logit), `same_greedy` (None unless
    `generate`) and `sentences`.
    """
    ours = open_for_inference(
        replace(recipe, translate=replace(recipe.translate, weights="replicated")), run, "trained"
    )
    exported = AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, dtype=getattr(torch, recipe.model.dtype)
    )
    # Both hold the weights in the type they were trained in; float32 arithmetic keeps rounding out of the comparison.
    ours.model.float()
    exported.to(ours.model.device).float().eval()
    routed = exported.config.model_type == "lander"
    difference, largest, same = 0.0, 0.0, True
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
            difference = max(difference, float((logits - expected).abs().max()))
            largest = max(largest, float(expected.abs().max()))
            bar.advance(1, pair)
    return {
        "max_logit_difference": difference,
        "max_logit": largest,
        "same_greedy": same if generate else None,
        "sentences": len(cases),
    }
