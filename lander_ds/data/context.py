"""The sentences before a sentence in its document, which its prompt may show (`data.prompt.context`)."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable


class Preceding:
    """Source sentences in the order of a corpus.

    Args:
        count: how many are kept; 0 keeps none.
    """

    def __init__(self, count: int) -> None:
        self._kept: deque[str] = deque(maxlen=count)
        self._document: Hashable = None

    def of(self, document: Hashable) -> tuple[str, ...]:
        """Those before the next sentence, which belongs to `document`; None: to no document, it stands alone."""
        if document is None or document != self._document:
            self._kept.clear()
        self._document = document
        return tuple(self._kept)

    def add(self, src: str) -> None:
        """That sentence has been read."""
        self._kept.append(src)
