"""TMX (Translation Memory eXchange 1.4): streamed, one translation unit in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast
from xml.etree.ElementTree import Element, ParseError, XMLPullParser

from lander_ds.common.errors import DataError
from lander_ds.data.sources.corpus import Corpus
from lander_ds.data.sources.files import Advance, read_raw_lines
from lander_ds.data.sources.rows import Rejection, Row, make_row
from lander_ds.data.tokens.languages import normalise_code

XML_LANG = "{http://www.w3.org/XML/1998/namespace}lang"

PIECE_BYTES = 1 << 16
"""Some tools write a whole memory on one line."""

# Inline elements whose content is markup of the original document, not text (TMX 1.4b, section 3.2).
NATIVE_CODE = frozenset({"bpt", "ept", "it", "ph", "ut"})


def read_tmx(corpus: Corpus, advance: Advance) -> Iterator[Row | Rejection]:
    """The units that have both languages; `en` also takes `en-US`, the exact code first.

    Raises:
        DataError: the file is not TMX, or no unit has both languages.
    """
    path = corpus.paths[0]
    parser: XMLPullParser[Element] = XMLPullParser(events=("start", "end"))
    parents: list[Element] = []
    languages: set[str] = set()
    matched, units, number = False, 0, 0
    try:
        for number, line in read_raw_lines(path, advance, PIECE_BYTES):
            parser.feed(line)
            for event, element in cast(Iterator[tuple[str, Element]], parser.read_events()):
                if event == "start":
                    _check_root(corpus, element, parents)
                    parents.append(element)
                    continue
                parents.pop()
                if _tag(element) != "tu":
                    continue
                units += 1
                texts = _variants(element)
                languages.update(texts if len(languages) < 50 else ())
                src, tgt = _pick(texts, corpus.src), _pick(texts, corpus.tgt)
                if src is not None and tgt is not None:
                    matched = True
                    yield make_row(corpus.name, number, src, tgt)
                # Without this the finished units would pile up under <body>.
                if parents:
                    parents[-1].remove(element)
        parser.close()
    except ParseError as error:
        if number == 0:
            return
        raise DataError(
            f"{path}: line {error.position[0]}: not well-formed XML ({error}): repair or export the TMX again"
        ) from None
    except (LookupError, ValueError) as error:  # an encoding that the XML parser does not know
        raise DataError(f"{path}: cannot be read as XML ({error}): convert it to UTF-8") from None
    if units and not matched:
        raise DataError(
            f"{path}: no unit has both {corpus.src} and {corpus.tgt} (found "
            f"{', '.join(sorted(languages)) or 'no language'}): correct {corpus.key}.path or .pairs"
        )


def _check_root(corpus: Corpus, element: Element, parents: list[Element]) -> None:
    if not parents and _tag(element) != "tmx":
        raise DataError(
            f"{corpus.name}: is XML, but its root is <{_tag(element)}>, not <tmx>: give a TMX file"
        )


def _tag(element: Element) -> str:
    return element.tag.rpartition("}")[2].lower()


def _variants(unit: Element) -> dict[str, str]:
    """Text per language code of a unit; the first variant of a code counts."""
    texts: dict[str, str] = {}
    for variant in unit:
        if _tag(variant) != "tuv":
            continue
        code = normalise_code(variant.get(XML_LANG) or variant.get("lang") or "")
        segment = next((child for child in variant if _tag(child) == "seg"), None)
        if code and segment is not None:
            texts.setdefault(code, _text(segment))
    return texts


def _text(element: Element) -> str:
    own = (
        ""
        if _tag(element) in NATIVE_CODE
        else (element.text or "") + "".join(_text(child) for child in element)
    )
    return own + ("" if _tag(element) == "seg" else element.tail or "")


def _pick(texts: dict[str, str], language: str) -> str | None:
    code = normalise_code(language)
    if code in texts:
        return texts[code]
    return next((text for variant, text in texts.items() if variant.startswith(f"{code}-")), None)
