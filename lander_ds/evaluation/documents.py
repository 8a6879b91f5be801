"""Whole documents: which sentences belong to one, and the metrics of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

DOCUMENTS = {"doc_bleu": "bleu", "doc_chrf": "chrf"}
"""Metrics of whole documents -> what they are of sentences."""


def documented(figures: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """Metrics of whole documents that some of the figures have: of systems, or flat ones of pairs."""
    known = set().union(*figures)
    return tuple(name for name in DOCUMENTS if name in known)


def document_lengths(names: Sequence[str | None]) -> list[int]:
    """How many sentences each document has.

    Args:
        names: of the document of every sentence; sentences of a document stand behind one another, and a sentence of none
            (None) is a document of its own.
    """
    begins = [
        index for index, name in enumerate(names) if not index or name is None or name != names[index - 1]
    ]
    return [end - begin for begin, end in itertools.pairwise([*begins, len(names)])]


def joined(sentences: Sequence[str], documents: Iterable[int]) -> list[str]:
    """Documents as texts of one line (R, d-BLEU of Liu et al. 2020)."""
    following = iter(sentences)
    return [" ".join(itertools.islice(following, count)) for count in documents]
