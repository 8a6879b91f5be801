"""Which language a translation is written in, and how often it is the wrong one.

py3langid's model ships in its package. On short software sentences it errs, and more so the more languages it
may choose from, so it chooses among the languages of the recipe and a few large ones, and the rate of the
references is reported next to the rates of the systems: that is what it makes of perfect translations.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from py3langid.langid import MODEL_FILE
from py3langid.langid import LanguageIdentifier as Identifier

from lander_ds.data.tokens.languages import macrolanguage, standard_code
from lander_ds.evaluation.scripts import is_written_in, script_of

LARGE_LANGUAGES = ("ar", "de", "en", "es", "fr", "hi", "id", "it", "ja", "ko", "pt", "ru", "tr", "vi", "zh")
"""Always candidates: what a model that misses the target language is likely to write."""

_OTHER_CODES = {"nb": "no", "fil": "tl", "cmn": "zh"}
"""Standard codes of languages that the identifier knows under another one."""


class LanguageIdentifier:
    """Identifies the language of translations.

    Args:
        languages: codes of the recipe's languages; those that the identifier does not know are no candidates.
    """

    def __init__(self, languages: Iterable[str]) -> None:
        known = known_languages()
        wanted = {code for code in map(identifier_code, languages) if code is not None}
        self._candidates = sorted(wanted | (set(LARGE_LANGUAGES) & known))
        # Its tables are shared: to choose languages puts parts of them beside them.
        self._identifier = copy.copy(_load())
        self._identifier.set_languages(self._candidates)

    def off_target(self, texts: Sequence[str], target_language: str) -> float | None:
        """Share of texts that are written in another language than `target_language`, or in another script than its
        code names (`sr_Latn`, `zh-Hant`): the identifier gives one code for all scripts of a language.

        Texts without a letter have no language and do not count.

        Returns:
            0 to 1, or None when the identifier does not know the language or no text has a letter.
        """
        target = identifier_code(target_language)
        written = [text for text in texts if any(character.isalpha() for character in text)]
        if target is None or not written:
            return None
        script = script_of(target_language)
        fitting = sum(
            str(self._identifier.classify(text)[0]) == target
            and (script is None or is_written_in(text, script))
            for text in written
        )
        return (len(written) - fitting) / len(written)


def identifier_code(language: str) -> str | None:
    """The identifier's code of a language: `zh` for `zh-Hant`, `de` for `deu_Latn`; None when it has none."""
    standard = standard_code(language)
    codes = (standard, standard.partition("-")[0], macrolanguage(language))
    for code in (_OTHER_CODES.get(code, code) for code in codes):
        if code in known_languages():
            return code
    return None


@cache
def known_languages() -> frozenset[str]:
    """Codes that the identifier can give."""
    return frozenset(_load().labels) - {"zxx"}


@cache
def _load() -> Any:
    return Identifier.from_model_file(MODEL_FILE)
