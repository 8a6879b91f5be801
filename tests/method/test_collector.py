"""The statistics: right values, and the same however the data is cut (identity 5)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.toy import CPU, LAYERS, METADATA, NEURONS, PAIRS, ToyModel, backward, collect, run_rank, samples
from support.worlds import server
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import cross_entropy, silu
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from lander_ds.common.errors import DataError, ModelError
from lander_ds.distributed import collectives
from lander_ds.method.awareness import STATISTICS, Awareness
from lander_ds.method.collector import StatisticsCollector


def assert_equal(got: Awareness, expected: Awareness) -> None:
    assert got.pairs == expected.pairs
    assert torch.equal(got.tokens, expected.tokens)
    for name in STATISTICS:
        # A signed sum may cancel: its error is measured against the sum of the absolute values.
        scale = expected.sum_abs_h if name == "sum_h" else getattr(expected, name)
        difference = (getattr(got, name) - getattr(expected, name)).abs()
        assert (difference <= 1e-6 * scale).all(), name


def reference(pair: int) -> dict[str, torch.Tensor]:
    """The statistics of one pair, [L, f] each, from sample-by-sample autograd in float64."""
    model = ToyModel().double()
    sums = {name: torch.zeros(LAYERS, NEURONS, dtype=torch.float64) for name in STATISTICS}
    for ids, targets, owner in samples():
        if owner != pair:
            continue
        x, inner = model.embedding(ids).requires_grad_(), []
        for gate, up, down in zip(model.gate, model.up, model.down, strict=True):
            inner.append(silu(gate(x)) * up(x))
            x = x + down(inner[-1])
        loss = cross_entropy(model.head(x), targets, reduction="sum", ignore_index=-100)
        for layer, (h, g) in enumerate(zip(inner, torch.autograd.grad(loss, inner), strict=True)):
            sums["sum_h"][layer] += h.detach().sum(0)
            sums["sum_abs_h"][layer] += h.detach().abs().sum(0)
            sums["active"][layer] += (h > 0).sum(0)
            sums["sum_abs_gh"][layer] += (g * h).detach().abs().sum(0)
            sums["sum_gh2"][layer] += (g * h).detach().square().sum(0)
    return sums


def test_values_are_those_of_plain_autograd() -> None:
    awareness = collect(samples(), size=5)
    for pair in range(len(PAIRS)):
        tokens = sum(len(ids) for ids, _, owner in samples() if owner == pair)
        assert awareness.tokens[pair] == tokens
        for name, expected in reference(pair).items():
            torch.testing.assert_close(getattr(awareness, name)[pair], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_any_micro_batch_size_gives_the_same(size: int) -> None:
    assert_equal(collect(samples(), size), collect(samples(), 12))


def test_any_order_of_the_data_gives_the_same() -> None:
    assert_equal(collect(samples()[::-1], 4), collect(samples(), 4))


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks_gives_the_same(ranks: int, tmp_path: Path) -> None:
    processes = [
        server().Process(target=run_rank, args=(rank, ranks, str(tmp_path), 3)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * ranks
    expected = collect(samples(), 12)
    for rank in range(ranks):
        assert_equal(Awareness.load(tmp_path / f"rank{rank}.safetensors"), expected)


def collect_padded(model: nn.Module, downs: list[nn.Module], rows: list[list[int]]) -> Awareness:
    """Rows of different lengths in padded micro-batches `rows` of row numbers; each row mixes two pairs."""
    lengths = (9, 4, 7, 6)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 40, (4, 9), generator=generator)
    with StatisticsCollector(dict(enumerate(downs)), len(downs), pairs=2, device=CPU) as collector:
        for batch in rows:
            width = max(lengths[row] for row in batch)
            mask = torch.tensor([[int(t < lengths[row]) for t in range(width)] for row in batch])
            own = ids[batch, :width]
            collector.set_pairs(torch.where(mask.bool(), torch.arange(width) % 2, -1))
            embedded = model.get_input_embeddings()(own).requires_grad_()  # type: ignore[operator]
            logits = model(inputs_embeds=embedded, attention_mask=mask).logits
            targets = torch.where(mask[:, 1:].bool(), own[:, 1:], -100)
            cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="sum").backward()
        collector.reduce(collectives.sum_over_ranks)
    return collector.finish(PAIRS[:2], METADATA)


def llama() -> tuple[nn.Module, list[nn.Module]]:
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config)
    return model, [layer.mlp.down_proj for layer in model.model.layers]


def opt() -> tuple[nn.Module, list[nn.Module]]:
    config = OPTConfig(
        vocab_size=40,
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        word_embed_proj_dim=16,
        max_position_embeddings=32,
        init_std=0.2,
    )
    model = OPTForCausalLM(config)
    return model, [layer.fc2 for layer in model.model.decoder.layers]


def bloom() -> tuple[nn.Module, list[nn.Module]]:
    model = BloomForCausalLM(
        BloomConfig(vocab_size=40, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.2)
    )
    return model, [block.mlp.dense_4h_to_h for block in model.transformer.h]


@pytest.mark.parametrize("make", [llama, opt, bloom])
def test_padding_is_ignored_and_no_weight_gets_a_gradient(make: object) -> None:
    torch.manual_seed(3)
    model, downs = make()  # type: ignore[operator]
    model.eval().requires_grad_(False)
    together = collect_padded(model, downs, [[0, 1, 2, 3]])
    assert together.tokens.tolist() == [5 + 2 + 4 + 3, 4 + 2 + 3 + 3]
    one_by_one = collect_padded(model, downs, [[0], [1], [2], [3]])
    for name in STATISTICS:
        torch.testing.assert_close(getattr(one_by_one, name), getattr(together, name), rtol=1e-4, atol=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_padding_may_hold_nan() -> None:
    down = nn.Linear(4, 2, bias=False).requires_grad_(False)
    h = torch.tensor([[1.0, 2, 3, -4], [float("nan")] * 4]).requires_grad_()
    with StatisticsCollector({0: down}, 1, pairs=1, device=CPU) as collector:
        collector.set_pairs(torch.tensor([0, -1]))
        down(h)[0].sum().backward()
        collector.reduce(collectives.sum_over_ranks)
    awareness = collector.finish(["en-de"], METADATA)
    assert awareness.sum_h[0, 0].tolist() == [1, 2, 3, -4]
    assert awareness.active[0, 0].tolist() == [1, 1, 1, 0]


def test_a_micro_batch_of_padding_alone_counts_nothing() -> None:
    expected = collect(samples(), 12)
    model = ToyModel()
    with StatisticsCollector(dict(enumerate(model.down)), LAYERS, pairs=len(PAIRS), device=CPU) as collector:
        backward(model, collector, samples())
        ids = torch.zeros(4, dtype=torch.int64)
        collector.set_pairs(torch.full((4,), -1))
        (model(ids).sum() * 0.0).backward()
        collector.reduce(collectives.sum_over_ranks)
    assert_equal(collector.finish(PAIRS, METADATA), expected)


def test_bfloat16_activations_are_summed_in_float32() -> None:
    down = nn.Linear(2, 1, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    h = torch.full((1000, 2), 1.0, dtype=torch.bfloat16).requires_grad_()
    with StatisticsCollector({0: down}, 1, pairs=1, device=CPU) as collector:
        collector.set_pairs(torch.zeros(1000, dtype=torch.int64))
        down(h).sum().backward()
        collector.reduce(collectives.sum_over_ranks)
    # In bfloat16 the sum of a thousand ones would stop at 256.
    assert collector.finish(["en-de"], METADATA).sum_h.tolist() == [[[1000.0, 1000.0]]]


def test_activations_are_freed_during_backward() -> None:
    model = ToyModel()
    seen: list[StorageWeakRef] = []
    with StatisticsCollector(dict(enumerate(model.down)), LAYERS, pairs=len(PAIRS), device=CPU) as collector:
        watch = model.down[1].register_forward_pre_hook(
            lambda _, inputs: seen.append(StorageWeakRef(inputs[0].untyped_storage()))
        )
        loss = backward(model, collector, samples())
        assert loss.requires_grad
        assert [reference.expired() for reference in seen] == [True]
        watch.remove()


def test_hooks_go_with_the_context_even_after_an_error() -> None:
    model = ToyModel()
    collector = StatisticsCollector(dict(enumerate(model.down)), LAYERS, pairs=len(PAIRS), device=CPU)
    with pytest.raises(ValueError, match="pair ids"), collector:
        collector.set_pairs(torch.tensor([99]))
    model(torch.zeros(5, dtype=torch.int64)).sum().backward()
    assert not any(down._forward_pre_hooks for down in model.down)


class TestMisuse:
    def collector(self, model: ToyModel) -> StatisticsCollector:
        return StatisticsCollector(dict(enumerate(model.down)), LAYERS, pairs=len(PAIRS), device=CPU)

    def test_forward_before_set_pairs(self) -> None:
        model = ToyModel()
        with self.collector(model), pytest.raises(RuntimeError, match="set_pairs"):
            model(torch.zeros(2, dtype=torch.int64))

    def test_other_number_of_tokens(self) -> None:
        model = ToyModel()
        with self.collector(model) as collector:
            collector.set_pairs(torch.zeros(3, dtype=torch.int64))
            with pytest.raises(RuntimeError, match=r"sees 5 tokens but set_pairs announced 3"):
                model(torch.zeros(5, dtype=torch.int64))

    def test_activations_without_gradient(self) -> None:
        model = ToyModel()
        with self.collector(model) as collector, torch.no_grad():
            collector.set_pairs(torch.zeros(3, dtype=torch.int64))
            with pytest.raises(RuntimeError, match="layer 0 carry no gradient"):
                model(torch.zeros(3, dtype=torch.int64))

    @pytest.mark.parametrize("wrong", [3, -2])
    def test_pair_id_out_of_range(self, wrong: int) -> None:
        with pytest.raises(ValueError, match="between -1"):
            self.collector(ToyModel()).set_pairs(torch.tensor([0, wrong]))

    def test_forward_without_backward(self) -> None:
        model = ToyModel()
        with self.collector(model) as collector:
            collector.set_pairs(torch.zeros(3, dtype=torch.int64))
            model(torch.zeros(3, dtype=torch.int64))
            with pytest.raises(RuntimeError, match="layer 0 recorded 0 of 1"):
                collector.reduce(collectives.sum_over_ranks)

    def test_reduce_twice(self) -> None:
        collector = self.collector(ToyModel())
        collector.reduce(collectives.sum_over_ranks)
        with pytest.raises(RuntimeError, match="twice"):
            collector.reduce(collectives.sum_over_ranks)

    def test_layers_of_different_width(self) -> None:
        with pytest.raises(ModelError, match=r"\[4, 6\]"):
            StatisticsCollector({0: nn.Linear(4, 2), 1: nn.Linear(6, 2)}, 2, pairs=1, device=CPU)


class TestUnusableStatistics:
    def test_pair_without_data(self) -> None:
        with pytest.raises(DataError, match=r"en-ru has no detection data.*split: detect"):
            collect([sample for sample in samples() if sample[2] != 2], 4)

    def test_pair_without_targets(self) -> None:
        data = [
            (ids, torch.full_like(targets, -100) if pair == 1 else targets, pair)
            for ids, targets, pair in samples()
        ]
        with pytest.raises(DataError, match="en-fr has no gradient"):
            collect(data, 4)

    def test_model_that_overflows(self) -> None:
        model = ToyModel()
        model.gate[1].weight.fill_(float("inf"))  # type: ignore[operator]
        with StatisticsCollector(
            dict(enumerate(model.down)), LAYERS, pairs=len(PAIRS), device=CPU
        ) as collector:
            backward(model, collector, samples())
            collector.reduce(collectives.sum_over_ranks)
        with pytest.raises(ModelError, match=r"layer 0 for pair en-de.*model\.dtype"):
            collector.finish(PAIRS, METADATA)
