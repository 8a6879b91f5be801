"""Preferences out of candidate translations: what `lander translate --n-best` wrote, ordered by a metric.

A line of the input is a JSON object with `src`, a reference and `n_best`; a line of the output has in their place the
better translation `tgt` and the worse one `rejected`, as `train.objective: cpo` reads them, and their scores.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sacrebleu.metrics import CHRF

from lander_ds.common.errors import DataError
from lander_ds.data.sources.files import read_lines
from lander_ds.evaluation.neural_scores import Segment

SentenceScores = Callable[[Sequence[Segment]], list[float]]
"""The score of every segment; more is better."""
Chosen = Literal["reference", "best"]


@dataclass(frozen=True)
class Candidates:
    """Translations of one source."""

    row: dict[str, Any]
    """What else stands in its line."""
    src: str
    ref: str
    texts: tuple[str, ...]
    """Different ones, none of them empty, the reference not among them."""


def read_candidates(path: Path, reference: str) -> list[Candidates]:
    """Everything in a file of JSON lines.

    Args:
        path: plain or compressed.
        reference: the key of the reference.

    Raises:
        DataError: there is no such file, or a line is not what it should be; the message has its number.
    """
    if not path.is_file():
        raise DataError(
            f"{path}: no such file: write it with lander translate --input ... --n-best 8 --output {path}"
        )
    read = [_candidates(path, number, line, reference) for number, line in read_lines(path, lambda _: None)]
    if not read:
        raise DataError(f"{path}: is empty: give at least one line")
    return read


def _candidates(path: Path, number: int, line: bytes, reference: str) -> Candidates:
    where = f"{path}, line {number}"
    try:
        row = json.loads(line.decode("utf-8"))
    except ValueError as error:
        raise DataError(f"{where} is no JSON object in UTF-8 ({error}): correct it") from None
    row = row if isinstance(row, dict) else {}
    listed = row.pop("n_best", None)
    row.pop("hyp", None)
    src, ref = row.pop("src", None), row.pop(reference, None)
    if not isinstance(src, str) or not isinstance(ref, str):
        raise DataError(
            f'{where} lacks a text under "src" or "{reference}": name the reference with --reference'
        )
    try:
        texts = [str(one["hyp"]).strip() for one in listed]
    except (TypeError, KeyError):
        raise DataError(f'{where} has no "n_best": translate with --n-best 2 or more') from None
    different = dict.fromkeys(text for text in texts if text and text != ref.strip())
    return Candidates(row, src, ref.strip(), tuple(different))


def chrf(segments: Sequence[Segment]) -> list[float]:
    """chrF2 of every segment, 0 to 100."""
    metric = CHRF()
    return [float(metric.sentence_score(one.mt, [one.ref]).score) for one in segments]


def preferences(
    candidates: Sequence[Candidates], score: SentenceScores, chosen: Chosen, margin: float
) -> Iterator[dict[str, Any]]:
    """The better and the worse translation of every source that has two.

    Args:
        candidates: from `read_candidates`.
        score: the metric.
        chosen: `reference`: it is the better one, and the candidate with the lowest score the worse. `best`: the candidate
            with the highest score is.
        margin: by how much the better one must be better; of two that are equally good none is.
    """
    texts = [(*one.texts, *([one.ref] if one.texts and chosen == "reference" else [])) for one in candidates]
    segments = [
        Segment(one.src, text, one.ref) for one, of in zip(candidates, texts, strict=True) for text in of
    ]
    scores = iter(score(segments))
    for one, of in zip(candidates, texts, strict=True):
        scored = [(next(scores), text) for text in of]
        if not scored:
            continue
        low, worse = min(scored[: len(one.texts)])
        high, better = scored[-1] if chosen == "reference" else max(scored)
        if high > low and high - low >= margin:
            both = {"tgt": better, "rejected": worse, "tgt_score": high, "rejected_score": low}
            yield {**one.row, "src": one.src, **both}
