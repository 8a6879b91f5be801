"""Is one way of training better than another? chrF over several directions and seeds, by paired bootstrap.

sacreBLEU's own test compares two translations of one test set. Here each side has a translation per direction and per
seed, and the sentences of a direction are drawn together for all seeds of both sides: two seeds are two looks at the
same sentences, not twice as many sentences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sacrebleu.metrics import CHRF

Texts = Sequence[str]
SAMPLES = 1000


@dataclass(frozen=True)
class Difference:
    """How much better one side is."""

    mean: float
    """Points of chrF2, macro-averaged over directions, each averaged over seeds."""
    low: float
    """Lower end of the 95 % interval of the bootstrap."""
    high: float
    """Upper end."""
    p: float
    """p-value: how often a difference as large would be seen by chance (R, Koehn 2004, two-sided as in sacreBLEU)."""
    per_pair: dict[str, float]
    """The same per direction."""


def compare(
    references: Mapping[str, Texts],
    a: Mapping[str, Sequence[Texts]],
    b: Mapping[str, Sequence[Texts]],
    samples: int = SAMPLES,
    seed: int = 1,
) -> Difference:
    """a minus b.

    Args:
        references: direction -> N texts.
        a: direction -> seed -> N texts.
        b: the same; the number of seeds may be another.
        samples: of the bootstrap.
        seed: of the bootstrap.
    """
    generator = np.random.default_rng(seed)
    observed: dict[str, float] = {}
    drawn = np.zeros(samples)
    for pair, texts in references.items():
        sides = [[_statistics(tuple(texts), tuple(one)) for one in side[pair]] for side in (a, b)]
        everything = np.ones((1, len(texts)), dtype=np.int64)
        times = generator.multinomial(len(texts), np.full(len(texts), 1 / len(texts)), size=samples)
        observed[pair] = float(_mean_score(sides[0], everything)[0] - _mean_score(sides[1], everything)[0])
        drawn += (_mean_score(sides[0], times) - _mean_score(sides[1], times)) / len(references)
    mean = fmean(observed.values())
    beyond = int((np.abs(drawn - drawn.mean()) >= abs(mean)).sum())
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Difference(mean, float(low), float(high), (beyond + 1) / (samples + 1), observed)


_METRIC: Any = CHRF()


@lru_cache(maxsize=1024)  # the baseline of an experiment is compared with everything else
def _statistics(references: tuple[str, ...], hypotheses: tuple[str, ...]) -> NDArray[np.int64]:
    """[N, orders * 3] counts of each sentence, from which sacreBLEU computes corpus scores."""
    return np.array(_against(references)._extract_corpus_statistics(list(hypotheses), None))


@lru_cache(maxsize=64)  # everything is compared with the same references
def _against(references: tuple[str, ...]) -> Any:
    return CHRF(references=[list(references)])


def _mean_score(seeds: Sequence[NDArray[np.int64]], times: NDArray[np.int64]) -> NDArray[np.float64]:
    """chrF2 [B], averaged over seeds, of corpora in which sentence i stands `times[b, i]` times."""
    scores = [[_METRIC._compute_f_score(row.tolist()) for row in times @ statistics] for statistics in seeds]
    mean: NDArray[np.float64] = np.mean(np.array(scores), axis=0)
    return mean
