"""What a micro-batch keeps: predicted on fake tensors, measured on real ones."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

import pytest
import torch
from plan_ranks import saved_bytes
from support.planned import recipe_of
from support.tiny_models import CONFIGS

from lander_ds.cluster.planning.activations import Activations, _linear, trace
from lander_ds.cluster.planning.anatomy import anatomy
from lander_ds.cluster.planning.workload import MicroBatch
from lander_ds.config.recipe import Recipe
from lander_ds.data.batching.packing import PackedBatch
from lander_ds.models.translation_model import TranslationModel

BATCH = MicroBatch(24, 8, (9, 9, 6))


def measured(recipe: Recipe, sharded: bool) -> int:
    """Bytes that a real forward pass saves; every pair has as many tokens."""
    built = anatomy(recipe)
    built.model.to_empty(device="cpu")
    for parameter in built.model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.02)
    pairs = torch.arange(BATCH.tokens) % len(recipe.data.pairs)
    ids, positions = torch.arange(3, 27), torch.cat([torch.arange(n) for n in BATCH.lengths])
    segments = torch.repeat_interleave(torch.arange(3), torch.tensor(BATCH.lengths))
    targets = torch.arange(BATCH.targets)
    bounds = torch.tensor([0, *accumulate(BATCH.lengths)], dtype=torch.int32)
    batch = PackedBatch(
        ids, positions, pairs, segments, BATCH.lengths, torch.arange(3), targets, targets + 3, bounds
    )
    with _linear(sharded):
        return saved_bytes(TranslationModel(built.model, built.family, len(recipe.data.pairs)), batch)


def predicted(recipe: Recipe, sharded: bool) -> Activations:
    return trace(recipe, BATCH, sharded, fused=False)


@pytest.mark.parametrize("case", CONFIGS)
def test_every_family_keeps_what_was_predicted(tmp_path: Path, case: str) -> None:
    recipe = recipe_of(tmp_path, case)
    for sharded in (False, True):
        kept = predicted(recipe, sharded)
        whole = kept.kept(0, 3, True, 0, recompute=False)
        assert whole == pytest.approx(measured(recipe, sharded), rel=0.05)


def test_nothing_is_kept_below_the_lowest_trained_layer(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "llama", "select.layers.criterion=last")
    kept = predicted(recipe, sharded=False)
    assert kept.layers[:2] == (0, 0)
    assert kept.layers[2] > 0
    everywhere = predicted(recipe_of(tmp_path, "llama", "select.layers.criterion=all"), sharded=False)
    assert everywhere.layers[2] > kept.layers[2], (
        "attention has a backward pass where something below is trained"
    )


def test_fused_attention_keeps_less_than_explicit(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "llama")
    long = MicroBatch(64, 8, (64,))
    assert (
        trace(recipe, long, False, fused=True).layers[1] < trace(recipe, long, False, fused=False).layers[1]
    )


def test_recomputation_keeps_the_inputs_of_layers_with_a_backward_pass() -> None:
    kept = Activations((0, 700, 800), end=50, hidden=100)
    assert kept.kept(0, 3, True, first_trained=1, recompute=True) == 2 * 100 + 50
    assert kept.kept(0, 2, False, first_trained=1, recompute=True) == 100
    assert kept.kept(0, 2, False, first_trained=1, recompute=False) == 700
    assert kept.largest(0, 2) == 700
