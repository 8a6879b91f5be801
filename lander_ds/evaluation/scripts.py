"""Which script a text is written in, for languages that are written in several: Serbian, Chinese, Uzbek, ..."""

from __future__ import annotations

import unicodedata
from collections import Counter

from lander_ds.data.tokens.languages import normalise_code, standard_code

_REGIONS = {
    "zh-cn": "hans",
    "zh-sg": "hans",
    "zh-my": "hans",
    "zh-tw": "hant",
    "zh-hk": "hant",
    "zh-mo": "hant",
    "zh-chs": "hans",
    "zh-cht": "hant",
}
"""Codes whose region says the script."""

_ALPHABETS = {
    "arab": {"ARABIC"},
    "armn": {"ARMENIAN"},
    "beng": {"BENGALI"},
    "cyrl": {"CYRILLIC"},
    "deva": {"DEVANAGARI"},
    "ethi": {"ETHIOPIC"},
    "geor": {"GEORGIAN"},
    "grek": {"GREEK"},
    "gujr": {"GUJARATI"},
    "guru": {"GURMUKHI"},
    "hang": {"HANGUL"},
    "hani": {"CJK"},
    "hans": {"CJK"},
    "hant": {"CJK"},
    "hebr": {"HEBREW"},
    "jpan": {"CJK", "HIRAGANA", "KATAKANA"},
    "khmr": {"KHMER"},
    "knda": {"KANNADA"},
    "kore": {"HANGUL", "CJK"},
    "laoo": {"LAO"},
    "latn": {"LATIN"},
    "mlym": {"MALAYALAM"},
    "mong": {"MONGOLIAN"},
    "mymr": {"MYANMAR"},
    "nkoo": {"NKO"},
    "olck": {"OL"},
    "orya": {"ORIYA"},
    "sinh": {"SINHALA"},
    "syrc": {"SYRIAC"},
    "taml": {"TAMIL"},
    "telu": {"TELUGU"},
    "tfng": {"TIFINAGH"},
    "thaa": {"THAANA"},
    "thai": {"THAI"},
    "tibt": {"TIBETAN"},
}
"""Script (ISO 15924) -> first words of the Unicode names of its letters."""

_CHARACTER_SETS = {"hans": ("gb2312", "big5"), "hant": ("big5", "gb2312")}
"""Simplified and traditional characters: the national character set that holds them, and the one that holds the others.
Many characters are in both."""


def script_of(language: str) -> str | None:
    """The script that a language code asks for: `latn` for `sr_Latn`, `hant` for `zh-TW`; None when it does not say, or
    for a script that is not known here."""
    named = (part for part in normalise_code(language).split("-")[1:] if part in _ALPHABETS)
    return next(named, None) or _REGIONS.get(standard_code(language))


def is_written_in(text: str, script: str) -> bool:
    """Whether no other script has more letters in `text`; for Chinese, whether it has no more characters of the other
    form than of this one."""
    letters = [character for character in unicodedata.normalize("NFKC", text) if character.isalpha()]
    if script in _CHARACTER_SETS:
        own, other = _CHARACTER_SETS[script]
        return _only_in(own, other, letters) >= _only_in(other, own, letters)
    wanted = _ALPHABETS[script]
    counts = Counter(unicodedata.name(letter, "?").partition(" ")[0] for letter in letters)
    others = (count for alphabet, count in counts.items() if alphabet not in wanted)
    return sum(counts[alphabet] for alphabet in wanted) >= max(others, default=0)


def _only_in(own: str, other: str, letters: list[str]) -> int:
    return sum(_holds(own, letter) and not _holds(other, letter) for letter in letters)


def _holds(character_set: str, letter: str) -> bool:
    try:
        letter.encode(character_set)
    except UnicodeEncodeError:
        return False
    return True
