"""Few sizes."""

from __future__ import annotations

from lander_ds.common.sizes import rounded_up


def test_rows_have_few_lengths() -> None:
    assert [rounded_up(count) for count in (1, 15, 16, 31, 32, 33, 63, 977, 1024, 1025)] == [
        *(1, 15, 16, 31, 32, 34, 64, 992, 1024, 1088)
    ]
    for low in (64, 1024):
        sizes = {rounded_up(count) for count in range(low, 2 * low)}
        assert len(sizes) <= 17
        assert all(count <= rounded_up(count) <= count * 17 / 16 for count in range(low, 2 * low))
