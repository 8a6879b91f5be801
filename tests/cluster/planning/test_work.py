"""Operations against those that torch counts; bytes on the wire against their formulas."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

import pytest
import torch
from support.planned import recipe_of
from torch.utils.flop_counter import FlopCounterMode

from lander_ds.cluster.planning.anatomy import anatomy
from lander_ds.cluster.planning.plan import sharding_of
from lander_ds.cluster.planning.work import operations, traffic
from lander_ds.cluster.planning.workload import MicroBatch
from lander_ds.config.recipe import Recipe
from lander_ds.data.batching.packing import PackedBatch
from lander_ds.models import attention
from lander_ds.models.span import Span
from lander_ds.models.translation_model import BatchTotals, TranslationModel

BATCH = MicroBatch(24, 8, (1,) * 24)
"""Examples of one token, so that attention costs nothing: it does not matter that a CPU computes the whole square."""


def counted(recipe: Recipe) -> tuple[int, int]:
    """Forward and backward operations of a real micro-batch, by torch."""
    built = anatomy(recipe)
    buffers = {name: buffer.clone() for name, buffer in built.model.named_buffers()}
    built.model.to_empty(device="cpu")
    for name, buffer in built.model.named_buffers():
        buffer.copy_(buffers[name])
    for parameter in built.model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.02)
    ids, targets = torch.arange(3, 27), torch.arange(BATCH.targets)
    pairs, zeros, segments = ids % len(recipe.data.pairs), torch.zeros_like(ids), torch.arange(24)
    bounds = torch.tensor([0, *accumulate(BATCH.lengths)], dtype=torch.int32)
    batch = PackedBatch(ids, zeros, pairs, segments, BATCH.lengths, segments, targets, targets + 3, bounds)
    model = TranslationModel(built.model, built.family, len(recipe.data.pairs))
    with FlopCounterMode(display=False) as forward:
        loss, *_ = model(batch, BatchTotals(1, 1))
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("case", ["llama", "gemma3", "bloom", "opt", "qwen3-moe"])
@pytest.mark.parametrize(
    "overrides",
    [
        ("select.layers.criterion=list", "select.layers.layers=[0]"),
        ("select.layers.criterion=list", "select.layers.layers=[1]"),
        ("train.method=layers", "select.layers.criterion=last"),
        ("train.method=full",),
        ("train.method=shira", "train.shira.r=2"),
    ],
)
def test_operations_are_those_that_torch_counts(
    tmp_path: Path, case: str, overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "LENGTH_STEP", 1)
    recipe = recipe_of(tmp_path, case, *overrides)
    built = anatomy(recipe)
    actual = operations(built, built.whole, BATCH)
    forward, backward = counted(recipe)
    # In sum, because the loss of a frozen head takes its gradient during the forward pass.
    assert actual.forward + actual.backward == pytest.approx(forward + backward, rel=0.03)
    assert actual.recompute == 0.0


def test_recomputation_repeats_layers_with_a_backward_pass(tmp_path: Path) -> None:
    recipe = recipe_of(
        tmp_path, "llama", "select.layers.criterion=last", "train.activation_checkpointing=true"
    )
    built = anatomy(recipe)
    by_layer = [operations(built, Span(i, i + 1, 3), BATCH) for i in range(3)]
    assert [part.recompute > 0 for part in by_layer] == [False, False, True]
    assert [part.backward > 0 for part in by_layer] == [False, False, True]


def test_zero3_gathers_every_weight_for_every_micro_batch(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "llama", f"deepspeed={tmp_path}/z.json", "select.layers.criterion=last")
    zero = '"stage": 3, "stage3_param_persistence_threshold": 100, "stage3_max_reuse_distance": 0'
    (tmp_path / "z.json").write_text(f'{{"zero_optimization": {{{zero}}}}}')
    built = anatomy(recipe)
    actual = traffic(built, built.whole, sharding_of(recipe, 1, [4], 1))
    large = sum(tensor.elements for tensor in built.tensors(built.whole) if tensor.elements > 100)
    again = sum(tensor.elements for tensor in built.layer(2) if tensor.elements > 100)
    assert actual.gathers == pytest.approx(4 * (large + again) * 3 / 4)
    trained = sum(tensor.elements for tensor in built.tensors(built.whole) if tensor.trained)
    assert actual.reductions == pytest.approx(4 * trained * 3 / 4)
    alone = traffic(built, built.whole, sharding_of(recipe, 1, [1], 1))
    assert (alone.gathers, alone.reductions, alone.collectives) == (0.0, 0.0, 0)


def test_replicated_sends_what_is_trained_and_nothing_else(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "llama", "topology=replicated", f"deepspeed={tmp_path}/r.json")
    (tmp_path / "r.json").write_text('{"zero_optimization": {"stage": 1}}')
    built = anatomy(recipe)
    actual = traffic(built, built.whole, sharding_of(recipe, 1, [4], 1))
    trained = sum(tensor.elements for tensor in built.tensors(built.whole) if tensor.trained)
    assert (actual.gathers, actual.collectives, actual.over_bus) == (0.0, 0, 0.0)
    assert actual.reductions == pytest.approx(2 * 4 * trained * 3 / 4)
    assert actual.updates == pytest.approx(4 * trained * 3 / 4)
