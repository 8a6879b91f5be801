"""Filters, and the memory of hashes behind them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lander_ds.common.errors import ConfigError
from lander_ds.config.schema.data import FilterConfig
from lander_ds.data.filters import Filter, Sentences, check_filters, normalise
from lander_ds.data.hashes import HashSet, text_hash
from lander_ds.data.sources.rows import Row


def row(src: str, tgt: str) -> Row:
    return Row("file", 1, src, tgt)


@pytest.mark.parametrize(
    ("src", "tgt", "reason"),
    [
        ("A fine day.", "Ein schöner Tag.", None),
        ("", "Tag", "empty"),
        ("Tag", "", "empty"),
        ("ab", "Tag", "too_short"),
        ("x" * 41, "y" * 30, "too_long"),
        ("abcdefg", "d" * 29, "length_ratio"),
        ("abcdefg", "d" * 28, None),
        ("abcdefg", "ä" * 28, None),
        ("abcdefg", "ä" * 29, "length_ratio"),
        ("abcdefg", "क" * 28, None),
        ("abc", "d" * 20, None),  # 3 letters count as 5
        ("abc", "d" * 21, "length_ratio"),
        ("你好世界你好世界", "d" * 40, None),
        ("你好世", "d" * 37, "length_ratio"),  # 3 wide characters count as 9 letters
        ("same", "same", "identical"),
    ],
)
def test_reasons(src: str, tgt: str, reason: str | None) -> None:
    config = FilterConfig(min_chars=3, max_chars=40, max_length_ratio=4.0)
    assert Filter(config, None).reason(row(src, tgt)) == reason


@pytest.mark.parametrize("tgt", ["ठीक है", "सब ठीक-ठाक है", "ໂອເຄ ຕົກລົງ", "យល់ព្រម", "好的"])
def test_short_pairs_into_other_scripts(tgt: str) -> None:
    assert Filter(FilterConfig(), None).reason(row("OK", tgt)) is None


def test_filters_can_be_switched_off() -> None:
    config = FilterConfig(max_length_ratio=0, drop_duplicates=False, drop_identical=False, test_overlap="off")
    held_out = Sentences(config)
    held_out.add("a", "a")
    keep = Filter(config, held_out)
    assert [keep.reason(row("a", "a")), keep.reason(row("a", "a")), keep.reason(row("a", "b" * 99))] == [
        None
    ] * 3


def test_duplicates_are_of_both_sides_together() -> None:
    keep = Filter(FilterConfig(), None)
    rows = [row("a", "b"), row("a", "c"), row("a", "b"), row("ab", "c"), row("a", "bc")]
    assert [keep.reason(r) for r in rows] == [None, None, "duplicate", None, None]


def test_overlap_with_held_out_sentences() -> None:
    config = FilterConfig(max_length_ratio=0)
    held_out = hold_out(config)
    held_out.add("...", "!!!")
    cases = {
        ("Hello, World!", "x"): "test_overlap_exact",
        ("y", "Straße"): "test_overlap_exact",
        ("hello world", "z"): "test_overlap_normalised",
        ("u", "STRASSE."): "test_overlap_normalised",
        ("Ｈｅｌｌｏ Ｗｏｒｌｄ", "v"): "test_overlap_normalised",
        ("?", "--"): None,  # punctuation alone is no sentence
        ("Hello, Welt!", "w"): None,
    }
    keep = Filter(config, held_out)
    assert {pair: keep.reason(row(*pair)) for pair in cases} == cases
    only_exact = replace(config, test_overlap="exact")
    exact = Filter(only_exact, hold_out(only_exact))
    assert exact.reason(row("hello world", "z")) is None
    assert exact.reason(row("Hello, World!", "x")) == "test_overlap_exact"


def hold_out(config: FilterConfig) -> Sentences:
    held_out = Sentences(config)
    held_out.add("Hello, World!", "Straße")
    return held_out


def test_normalise_keeps_combining_vowels() -> None:
    assert normalise("कि") != normalise("का")
    assert normalise("  Don\u2019t\u00a0stop… ") == "dontstop"


@pytest.mark.parametrize(
    "config",
    [
        FilterConfig(min_chars=5, max_chars=4),
        FilterConfig(max_length_ratio=0.5),
    ],
)
def test_impossible_limits_are_refused(config: FilterConfig) -> None:
    with pytest.raises(ConfigError, match=r"data\.filters"):
        check_filters(config)


@given(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 5) | st.just(1 << 32)))
def test_hash_set_is_a_set(values: list[int]) -> None:
    ours, reference = HashSet(), set()
    for value in (value or 1 for value in values):  # 0 and 1 count as one value
        assert ours.add(value) == (value not in reference)
        reference.add(value)
    assert len(ours) == len(reference)
    assert all(value in ours for value in reference)


def test_hash_set_grows() -> None:
    ours = HashSet()
    for number in range(20_000):
        assert ours.add(text_hash(str(number)))
    assert all(text_hash(str(number)) in ours for number in range(20_000))
    assert not any(text_hash(str(number)) in ours for number in range(20_000, 40_000))


INVISIBLE = "\u200b\u00ad\ufeff\u2060\u200e\u200f\u202a\u202c\u202e\u2066\u2069\ufe0f"


@pytest.mark.parametrize("character", INVISIBLE)
class TestInvisibleCharacters:
    """They are left out of comparisons."""

    def test_of_a_test_sentence(self, character: str) -> None:
        config = FilterConfig()
        held_out = hold_out(config)
        held_out.add("A hidden sentence", "Ein versteckter Satz")
        hidden = row(f"{character}A hid{character}den sentence", "etwas anderes")
        assert Filter(config, held_out).reason(hidden) == "test_overlap_normalised"
        other = Sentences(config)
        other.add(f"A hid{character}den sentence", "Satz")
        assert other.overlap("A hidden sentence", "b") == "test_overlap_normalised"

    def test_of_duplicates_and_empty_sides(self, character: str) -> None:
        keep = Filter(FilterConfig(), None)
        rows = [
            row("a word", "Wort"),
            row(f"a wo{character}rd", "Wort"),
            row(character * 3, "b"),
            row("b", f"{character} {character}"),
        ]
        assert [keep.reason(item) for item in rows] == [None, "duplicate", "empty", "empty"]


@pytest.mark.parametrize("joiner", ["\u200c", "\u200d"])
def test_joiners_count(joiner: str) -> None:
    keep = Filter(FilterConfig(), None)
    assert [keep.reason(row(src, "x")) for src in ("می خواهم", f"می{joiner}خواهم", "میخواهم")] == [None] * 3
    assert normalise(f"a{joiner}b") != normalise("ab")
