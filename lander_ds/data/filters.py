"""Which sentence pairs are dropped, and why."""

from __future__ import annotations

import math
import re
import sys
import unicodedata
from functools import cache

from lander_ds.common.errors import ConfigError
from lander_ds.config.schema.data import FilterConfig
from lander_ds.data.hashes import HashSet, text_hash
from lander_ds.data.sources.rows import Reason, Row

_INVISIBLE = re.compile(
    # Soft hyphen, grapheme joiner, Arabic letter mark, Mongolian vowel separator; zero-width space, direction marks;
    # word joiner, invisible operators, isolates; variation selectors; byte order mark. Not ZWNJ (U+200C) and ZWJ
    # (U+200D): words and emoji differ in them.
    "[\u00ad\u034f\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff]"
)

SHORT = 5
"""Letters that the shorter side counts at least when lengths are compared: the ratio of a word or two says little."""


def check_filters(config: FilterConfig) -> None:
    """Refuse limits that nothing can meet.

    Raises:
        ConfigError: the minimum lies above the maximum, or the ratio below 1.
    """
    if config.max_chars < config.min_chars:
        raise ConfigError(
            f"data.filters: min_chars {config.min_chars} and max_chars {config.max_chars} leave nothing: "
            "raise max_chars"
        )
    if config.max_length_ratio != 0 and config.max_length_ratio < 1:
        raise ConfigError(
            f"data.filters.max_length_ratio: {config.max_length_ratio} leaves nothing: use 1 or more, or 0 "
            "to switch it off"
        )


class Sentences:
    """Sentences of every pair and both sides, as hashes: those of valid and test, which must not be trained on, or those
    of the training data, which say nothing in a test.

    Args:
        config: the recipe's filters.
        exact, normalised: why a row is dropped that has one of them.
    """

    def __init__(
        self,
        config: FilterConfig,
        exact: Reason = "test_overlap_exact",
        normalised: Reason = "test_overlap_normalised",
    ) -> None:
        self._mode = config.test_overlap
        self._reasons = exact, normalised
        self._exact, self._normalised = HashSet(), HashSet()

    def add(self, *texts: str) -> None:
        """Remember texts."""
        for text in texts:
            self._exact.add(text_hash(text))
            if self._mode == "normalised" and (normal := normalise(text)):
                self._normalised.add(text_hash(normal))

    def overlap(self, *texts: str) -> Reason | None:
        """Why a row with these texts is dropped, if one of them is among these sentences."""
        if self._mode == "off":
            return None
        exact, normalised = self._reasons
        if any(text_hash(text) in self._exact for text in texts):
            return exact
        if self._mode == "normalised" and any(
            text_hash(normalise(text)) in self._normalised for text in texts
        ):
            return normalised
        return None


class TextFilter:
    """The filters of texts without a pair: none is empty, too short or there twice, and no line of one is to be kept apart.

    Args:
        config: the recipe's filters.
        apart: sentences of which the texts must have none.
    """

    def __init__(self, config: FilterConfig, apart: Sentences) -> None:
        self._config, self._apart = config, apart
        self._seen = HashSet()

    def reason(self, row: Row) -> Reason | None:
        """Why a text is dropped, or None when it is kept."""
        text = visible(row.tgt)
        if not text:
            return "empty"
        if len(text) < self._config.min_chars:
            return "too_short"
        for line in (*row.src.splitlines(), *row.tgt.splitlines()):
            if reason := self._apart.overlap(line):
                return reason
        if self._config.drop_duplicates and not self._seen.add(text_hash(f"{visible(row.src)}\0{text}")):
            return "duplicate"
        return None


class Filter:
    """The filters of one pair's split. Remembers what it has seen, so each row is asked about once.

    Args:
        config: the recipe's filters.
        apart: sentences of which the split must have none; None for valid and test of `data.corpora`.
    """

    def __init__(self, config: FilterConfig, apart: Sentences | None) -> None:
        self._config, self.apart = config, apart
        self._seen = HashSet()

    def reason(self, row: Row) -> Reason | None:
        """Why a row is dropped, or None when it is kept."""
        if reason := self._shape(row):
            return reason
        src, tgt, *rejected = texts = [visible(text) for text in row.texts]
        if self._config.drop_identical and src == tgt:
            return "identical"
        if tgt in rejected:
            return "no_preference"
        if any(score < self._config.min_score.get(name, -math.inf) for name, score in row.scores):
            return "low_score"
        if self.apart and (reason := self.apart.overlap(*row.texts)):
            return reason
        # One source may have several worse translations.
        if self._config.drop_duplicates and not self._seen.add(text_hash("\0".join(texts))):
            return "duplicate"
        return None

    def _shape(self, row: Row) -> Reason | None:
        config = self._config
        lengths = [len(text) for text in row.texts]
        if not all(map(visible, row.texts)):
            return "empty"
        if min(lengths) < config.min_chars:
            return "too_short"
        if max(lengths) > config.max_chars:
            return "too_long"
        if config.max_length_ratio:
            small, large = sorted((letters(row.src), letters(row.tgt)))
            if large > config.max_length_ratio * max(small, SHORT):
                return "length_ratio"
        return None


def letters(text: str) -> int:
    """Length of a text in letters that is fair between scripts: a wide (East Asian) character says as much as three."""
    return len(text) + (0 if text.isascii() else 2 * sum(map(_is_wide, text)))


def _is_wide(character: str) -> bool:
    return unicodedata.east_asian_width(character) in "WF"


def visible(text: str) -> str:
    """Text for comparison: without the characters that show nothing, stripped. The corpus keeps them."""
    return _INVISIBLE.sub("", text).strip()


def normalise(text: str) -> str:
    """Text for comparison: NFKC, case-folded, without punctuation, white space and invisible characters."""
    folded = unicodedata.normalize("NFKC", visible(text)).casefold()
    return unicodedata.normalize("NFKC", folded).translate(_dropped_characters())


@cache
def _dropped_characters() -> dict[int, None]:
    return {
        code: None
        for code in range(sys.maxunicode + 1)
        if unicodedata.category(chr(code))[0] in "PZ" or chr(code).isspace()
    }
