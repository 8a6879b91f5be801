"""Language codes: the two halves of a pair, and the English names that prompts use."""

from __future__ import annotations

from collections.abc import Mapping

import langcodes
from langcodes.tag_parser import LanguageTagError

from lander_ds.common.errors import ConfigError

# ISO 639-1 codes, and the ISO 639-3, script and region codes that translation corpora use.
_NAMES = """
af Afrikaans, am Amharic, ar Arabic, as Assamese, ast Asturian, az Azerbaijani, ba Bashkir, be Belarusian,
bg Bulgarian, bn Bengali, bo Tibetan, br Breton, bs Bosnian, ca Catalan, ceb Cebuano, co Corsican, cs Czech,
cv Chuvash, cy Welsh, da Danish, de German, dv Dhivehi, el Greek, en English, eo Esperanto, es Spanish,
et Estonian, eu Basque, fa Persian, ff Fulah, fi Finnish, fil Filipino, fo Faroese, fr French,
fy Western Frisian, ga Irish, gd Scottish Gaelic, gl Galician, gn Guarani, gu Gujarati, ha Hausa,
haw Hawaiian, he Hebrew, hi Hindi, hmn Hmong, hr Croatian, ht Haitian Creole, hu Hungarian, hy Armenian,
ia Interlingua, id Indonesian, ig Igbo, ilo Ilocano, is Icelandic, it Italian, iu Inuktitut, ja Japanese,
jv Javanese, ka Georgian, kk Kazakh, km Khmer, kn Kannada, ko Korean, ku Kurdish, ky Kyrgyz, la Latin,
lb Luxembourgish, lg Ganda, ln Lingala, lo Lao, lt Lithuanian, lv Latvian, mai Maithili, mg Malagasy,
mi Maori, mk Macedonian, ml Malayalam, mn Mongolian, mr Marathi, ms Malay, mt Maltese, my Burmese,
nb Norwegian Bokmål, ne Nepali, nl Dutch, nn Norwegian Nynorsk, no Norwegian, nso Northern Sotho,
ny Chichewa, oc Occitan, om Oromo, or Odia, pa Punjabi, pl Polish, ps Pashto, pt Portuguese,
pt-BR Brazilian Portuguese, qu Quechua, ro Romanian, ru Russian, rw Kinyarwanda, sa Sanskrit, sc Sardinian,
sd Sindhi, se Northern Sami, sh Serbo-Croatian, si Sinhala, sk Slovak, sl Slovenian, sm Samoan, sn Shona,
so Somali, sq Albanian, sr Serbian, ss Swati, st Southern Sotho, su Sundanese, sv Swedish, sw Swahili,
ta Tamil, te Telugu, tg Tajik, th Thai, ti Tigrinya, tk Turkmen, tl Tagalog, tn Tswana, to Tongan,
tr Turkish, ts Tsonga, tt Tatar, tw Twi, ug Uyghur, uk Ukrainian, ur Urdu, uz Uzbek, vi Vietnamese,
war Waray, wo Wolof, xh Xhosa, yi Yiddish, yo Yoruba, yue Cantonese, zh Chinese, zh-CN Simplified Chinese,
zh-Hans Simplified Chinese, zh-Hant Traditional Chinese, zh-TW Traditional Chinese, zu Zulu
"""


def _parse_names() -> dict[str, str]:
    entries = (entry.split(maxsplit=1) for entry in _NAMES.split(","))
    return {code.lower(): name.strip() for code, name in entries}


LANGUAGE_NAMES: Mapping[str, str] = _parse_names()
"""English names by lower-case code with hyphens."""


def split_pair(pair: str) -> tuple[str, str]:
    """Source and target language of a pair: `en-de` gives `en`, `de`; `en-pt-BR` gives `en`, `pt-BR`.

    Raises:
        ConfigError: the pair has no hyphen between two codes.
    """
    src, _, tgt = pair.partition("-")
    if not src or not tgt:
        raise ConfigError(f"data.pairs: {pair!r} is not a pair: write source and target language, e.g. en-de")
    return src, tgt


def normalise_code(code: str) -> str:
    """A language code for comparison: `en_US` and `EN-us` become `en-us`."""
    return code.strip().replace("_", "-").lower()


def standard_code(code: str) -> str:
    """The shortest code of the same language, script and region: `deu_Latn` and `de` become `de`, `zho_Hant` becomes
    `zh-hant`. What is no code stays, in the form of `normalise_code`."""
    normalised = normalise_code(code)
    try:
        return langcodes.standardize_tag(normalised).lower()
    except LanguageTagError:
        return normalised


def macrolanguage(code: str) -> str:
    """The code without region and script of the language that one belongs to: `arb` and `ar` become `ar`."""
    try:
        return langcodes.standardize_tag(normalise_code(code), macro=True).partition("-")[0].lower()
    except LanguageTagError:
        return normalise_code(code)


def is_known(code: str) -> bool:
    """Whether a text is a language code with a name, or a three-letter code with a script, as FLORES writes them."""
    normalised = normalise_code(code)
    base, _, rest = normalised.partition("-")
    return base in LANGUAGE_NAMES or (len(base) == 3 and len(rest) == 4)


def language_name(code: str, overrides: Mapping[str, str]) -> str:
    """The English name of a language: from `overrides`, the table (there also without region and script), or CLDR.

    Raises:
        ConfigError: nothing is known about the code.
    """
    if code in overrides:
        return overrides[code]
    normalised, standard = normalise_code(code), standard_code(code)
    for candidate in (normalised, standard, normalised.partition("-")[0], standard.partition("-")[0]):
        if candidate in LANGUAGE_NAMES:
            return LANGUAGE_NAMES[candidate]
    if langcodes.tag_is_valid(standard):
        return langcodes.Language.get(standard).language_name()
    raise ConfigError(
        f"data.prompt.template wants a language name, and none is known for {code!r}: add "
        f"data.prompt.language_names: {{{code}: ...}}"
    )
