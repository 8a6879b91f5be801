"""Noise on the gate's logits, and what gates report: statistics per pair, shares for the budget loss."""

from __future__ import annotations

import pytest
import torch
from support.small_ffn import PAIRS, c_by_hand, run, small_ffn, tokens

from lander_ds.data.batching.packing import PackedBatch
from lander_ds.models.routed_ffn import gate_noise
from lander_ds.models.translation_model import GateReport, GateStatistics


def splitmix64(key: int) -> int:
    """The finaliser of SplitMix64 in Python's unbounded integers."""
    mask = (1 << 64) - 1
    z = key & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


@pytest.mark.parametrize("layer", [0, 1, 2, 31, 125])
def test_noise_is_box_muller_over_splitmix64(layer: int) -> None:
    keys = [0, 1, 2**62, -1, -(2**63), 2**63 - 1, 123456789]
    expected = []
    for key in keys:
        z = splitmix64(key + (layer + 1) * 0x9E3779B97F4A7C15)
        first, second = ((z & 0xFFFFFF) + 1) / 2**24, (z >> 40) / 2**24
        radius = (-2 * torch.log(torch.tensor(first, dtype=torch.float64))).sqrt()
        expected.append(radius * torch.cos(2 * torch.pi * torch.tensor(second, dtype=torch.float64)))
    actual = gate_noise(torch.tensor(keys), layer)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, torch.stack(expected).float())


def test_noise_is_standard_normal_and_differs_by_layer() -> None:
    sample = torch.arange(200).repeat_interleave(500) << 24
    keys = sample + torch.arange(500).repeat(200)
    noise = torch.stack([gate_noise(keys, layer).double() for layer in range(4)])
    assert torch.isfinite(noise).all()
    assert noise.mean(1).abs().max() < 0.02
    assert (noise.std(1) - 1).abs().max() < 0.02
    assert ((noise**4).mean(1) - 3).abs().max() < 0.15
    correlation = torch.corrcoef(noise)
    assert (correlation - torch.eye(4)).abs().max() < 0.02
    neighbours = torch.corrcoef(torch.stack([noise[0, :-1], noise[0, 1:]]))[0, 1]
    assert abs(neighbours) < 0.02


def test_noise_depends_on_nothing_but_key_and_layer() -> None:
    keys = torch.arange(10_000)
    order = torch.randperm(len(keys))
    whole = gate_noise(keys, 5)
    torch.manual_seed(99)
    assert torch.equal(gate_noise(keys[order], 5), whole[order])
    assert torch.equal(gate_noise(keys[17:18], 5), whole[17:18])


KEYS = torch.arange(12) * 7


def test_noise_moves_the_logit_by_alpha_times_the_noise() -> None:
    ffn = small_ffn()
    x, pair_ids = tokens()
    values: list[torch.Tensor] = []
    out = run(ffn, x, pair_ids, KEYS, 1.5, values.append)
    expected = torch.sigmoid(torch.logit(c_by_hand(ffn, x)) + 1.5 * gate_noise(KEYS, ffn.layer)[:, None])
    torch.testing.assert_close(values[0].double(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(out, run(ffn, x, pair_ids, KEYS))


def test_no_noise_with_alpha_zero_or_in_evaluation() -> None:
    ffn = small_ffn()
    x, pair_ids = tokens()
    expected = run(ffn, x, pair_ids)
    assert torch.equal(run(ffn, x, pair_ids, KEYS), expected)
    assert torch.equal(run(ffn, x, pair_ids, KEYS, 2.0), run(ffn, x, pair_ids, KEYS, 2.0))
    assert torch.equal(run(ffn.eval(), x, pair_ids, KEYS, 2.0), expected)


def batch_of(pair_ids: torch.Tensor, segment_ids: torch.Tensor, examples: int) -> PackedBatch:
    """A micro-batch of which gates need pairs and examples alone."""
    lengths = tuple(int((segment_ids == example).sum()) for example in range(examples))
    nothing = torch.zeros(0, dtype=torch.int64)
    return PackedBatch(nothing, nothing, pair_ids, segment_ids, lengths, nothing, nothing, nothing, nothing)


def test_statistics_add_up_over_micro_batches_and_leave_padding_out() -> None:
    ffn = small_ffn()
    x, pair_ids = tokens()
    pair_ids = pair_ids.clone()
    pair_ids[:2] = -1
    statistics = GateStatistics()
    for part in (slice(0, 5), slice(5, None)):
        batch = batch_of(pair_ids[part], torch.zeros_like(pair_ids[part]), 1)
        report = GateReport(batch, len(PAIRS), statistics=True, budget=False)
        run(ffn, x[part], pair_ids[part], gates=report)
        assert report.share is None
        assert report.sums is not None
        statistics.add(ffn.layer, report.sums)
    c = c_by_hand(ffn, x).squeeze(-1)
    sums = statistics.sums[ffn.layer]
    assert sums.shape == (2, len(PAIRS))
    assert not sums.requires_grad
    for pair in range(len(PAIRS)):
        assert sums[1, pair] == (pair_ids == pair).sum()
        torch.testing.assert_close(sums[0, pair], c[pair_ids == pair].sum().detach(), rtol=1e-5, atol=1e-6)


def test_shares_of_the_specific_side_are_summed_per_example_and_carry_gradients() -> None:
    ffn = small_ffn()
    x, pair_ids = tokens()
    segment_ids = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 2])
    batch = batch_of(pair_ids, segment_ids, 4)  # the last has no token
    report = GateReport(batch, len(PAIRS), statistics=False, budget=True)
    run(ffn, x, pair_ids, gates=report)
    assert report.sums is None
    assert report.share is not None
    expected = torch.zeros(4, dtype=torch.float64).index_add(0, segment_ids, 1 - c_by_hand(ffn, x)[:, 0])
    torch.testing.assert_close(report.share.double(), expected, rtol=1e-5, atol=1e-6)
    report.share.sum().backward()
    assert ffn.router is not None
    assert ffn.router.w2.grad is not None
    assert ffn.router.w2.grad.abs().max() > 0
    assert ffn.banks[0].up.grad is None


def test_a_layer_without_gate_reports_nothing() -> None:
    x, pair_ids = tokens()
    run(small_ffn(gate="none"), x, pair_ids, gates=lambda _: pytest.fail("there is no gate"))
