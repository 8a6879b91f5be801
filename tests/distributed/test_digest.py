"""Digests of weights: the same for the same bits, another for any change, wherever the parts are cut."""

from __future__ import annotations

import pytest
import torch

from lander_ds.distributed.engines import digest as module
from lander_ds.distributed.engines.digest import digest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8])
def test_any_change_of_one_element_shows(dtype: torch.dtype) -> None:
    values = torch.arange(30).to(dtype).view(5, 6)
    before = int(digest(values))
    assert int(digest(values.clone())) == before
    for index in range(values.numel()):
        changed = values.clone()
        changed.view(-1)[index] += 1
        assert int(digest(changed)) != before


def test_bits_count_not_values() -> None:
    zero, minus = torch.zeros(3), torch.tensor([0.0, -0.0, 0.0])
    assert torch.equal(zero, minus)
    assert int(digest(zero)) != int(digest(minus))


def test_order_counts() -> None:
    values = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert int(digest(values)) != int(digest(values.flip(0)))


def test_parts_and_views_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(8, 7, generator=torch.Generator().manual_seed(0))
    whole = int(digest(values))
    monkeypatch.setattr(module, "_AT_ONCE", 5)
    assert int(digest(values)) == whole
    assert int(digest(values.t().contiguous().t())) == whole
    assert int(digest(torch.empty(0))) == 0
