"""Scores of a named test set: `sets.NAME` of `scores.json`, what the model learned, kept and forgot.

`directions` has per direction what `pairs` has, and `trained`, whether it is among `data.pairs`. `mean` has the means over
the `trained` and over the `untrained` directions, per system, of the systems that translated all of them.
`monolingual` has per target language and system the loss of the references as plain text.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from typing import Any

from lander_ds.config.schema.results import ScoreConfig
from lander_ds.evaluation.language import LanguageIdentifier
from lander_ds.evaluation.neural_scores import NeuralScores
from lander_ds.evaluation.score import Translations, means, score_pair
from lander_ds.inference.losses import TextLoss


def score_set(
    translations: Mapping[str, Translations],
    losses: Mapping[str, Mapping[str, TextLoss]],
    trained: Collection[str],
    config: ScoreConfig,
    seed: int,
    identifier: LanguageIdentifier,
    neural: Mapping[str, NeuralScores],
) -> dict[str, Any]:
    """The entry of a test set.

    Args:
        translations: by direction and system.
        losses: by system and language.
        trained: the directions of `data.pairs`.
        config: metrics and bootstrap.
        seed: of the bootstrap.
        identifier: for the off-target rate.
        neural: by metric, the scores of every segment.

    Raises:
        ArtefactError, ConfigError: as `score_pair`.
    """
    directions: dict[str, dict[str, Any]] = {}
    signatures = {}
    for pair, systems in translations.items():
        entry, signatures[pair] = score_pair(pair, systems, config, seed, identifier, neural)
        directions[pair] = {"trained": pair in trained, **entry}
    groups = {
        name: {pair: entry for pair, entry in directions.items() if entry["trained"] is own}
        for name, own in (("trained", True), ("untrained", False))
    }
    return {
        "directions": directions,
        "mean": {name: _means(entries, neural) for name, entries in groups.items() if entries},
        "monolingual": _monolingual(losses),
        "signatures": signatures,
    }


def _means(
    entries: Mapping[str, Mapping[str, Any]], neural: Iterable[str]
) -> dict[str, dict[str, float | None]]:
    common = set.intersection(*(set(entry["systems"]) for entry in entries.values()))
    kept = {
        pair: {"systems": {name: figures for name, figures in entry["systems"].items() if name in common}}
        for pair, entry in entries.items()
    }
    return means(kept, neural)


def _monolingual(losses: Mapping[str, Mapping[str, TextLoss]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Language -> system -> sums, and their quotients."""
    figures: dict[str, dict[str, dict[str, Any]]] = {}
    for system, of_system in losses.items():
        for language, loss in of_system.items():
            figures.setdefault(language, {})[system] = {
                **asdict(loss),
                "nats_per_token": loss.nats / loss.tokens,
                "bits_per_byte": loss.nats / math.log(2) / loss.bytes,
            }
    return figures
