"""Noise on the gate's logits, and what gates report: statistics per pair, shares for the budget loss."""

from __future__ import annotations

import pytest
import torch
from small_ffn import PAIRS, c_by_hand, small_ffn, tokens

from lander_ds.models.routed_ffn import RoutedFFN, gate_noise


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
    found = gate_noise(torch.tensor(keys), layer)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.stack(expected).float())


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


def noisy(alpha: float) -> tuple[RoutedFFN, torch.Tensor]:
    ffn = small_ffn()
    x, pair_ids = tokens()
    ffn.state.begin(pair_ids)
    ffn.state.alpha = alpha
    ffn.state.noise_keys = torch.arange(len(x)) * 7
    return ffn, x


def test_noise_moves_the_logit_by_alpha_times_the_noise() -> None:
    ffn, x = noisy(1.5)
    clean, _ = noisy(0.0)
    ffn.state.statistics = {}
    noise = gate_noise(torch.arange(len(x)) * 7, ffn.layer)[:, None]
    logits = torch.logit(c_by_hand(ffn, x))
    expected = torch.sigmoid(logits + 1.5 * noise)
    out = ffn(x)
    assert not torch.allclose(out, clean(x))
    for pair in range(len(PAIRS)):
        mean = expected[torch.arange(len(x)) % len(PAIRS) == pair].mean()
        total, count = ffn.state.statistics[ffn.layer][:, pair]
        torch.testing.assert_close(total / count, mean, rtol=1e-5, atol=1e-6)


def test_no_noise_with_alpha_zero_or_in_evaluation() -> None:
    clean, x = noisy(0.0)
    clean.state.noise_keys = None
    expected = clean(x)
    assert torch.equal(noisy(0.0)[0](x), expected)
    assert torch.equal(noisy(2.0)[0].eval()(x), expected)
    assert torch.equal(noisy(2.0)[0](x), noisy(2.0)[0](x))


def test_statistics_add_up_over_forwards_and_leave_padding_out() -> None:
    ffn = small_ffn()
    x, pair_ids = tokens()
    pair_ids = pair_ids.clone()
    pair_ids[:2] = -1
    ffn.state.statistics = {}
    for part in (slice(0, 5), slice(5, None)):
        ffn.state.begin(pair_ids[part])
        ffn(x[part])
    c = c_by_hand(ffn, x).squeeze(-1)
    found = ffn.state.statistics[ffn.layer]
    assert found.shape == (2, len(PAIRS))
    assert not found.requires_grad
    for pair in range(len(PAIRS)):
        assert found[1, pair] == (pair_ids == pair).sum()
        torch.testing.assert_close(found[0, pair], c[pair_ids == pair].sum().detach(), rtol=1e-5, atol=1e-6)


def test_shares_of_the_specific_side_are_summed_per_example_and_carry_gradients() -> None:
    ffn = small_ffn()
    x, pair_ids = tokens()
    state = ffn.state
    state.begin(pair_ids)
    state.segment_ids = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 2])
    state.examples = 4  # the last has no token
    state.specific_share = []
    ffn(x)
    (share,) = state.specific_share
    expected = torch.zeros(4, dtype=torch.float64).index_add(
        0, state.segment_ids, 1 - c_by_hand(ffn, x)[:, 0]
    )
    torch.testing.assert_close(share.double(), expected, rtol=1e-5, atol=1e-6)
    share.sum().backward()
    assert ffn.router is not None
    assert ffn.router.w2.grad is not None
    assert ffn.router.w2.grad.abs().max() > 0
    assert ffn.banks[0].up.grad is None


def test_nothing_is_collected_unless_asked() -> None:
    ffn = small_ffn()
    x, pair_ids = tokens()
    ffn.state.begin(pair_ids)
    ffn(x)
    assert ffn.state.statistics is None
    assert ffn.state.specific_share is None
