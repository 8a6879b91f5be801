"""Translating a split: batches of one pair, longest first, shared out over the ranks, resumable by sentence.

A batch holds one pair because the routing needs to know it; the longest sentences come first so that memory
peaks at the start and not after an hour.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lander_ds.common.console import progress
from lander_ds.common.errors import ArtefactError
from lander_ds.config.schema.results import TranslateConfig
from lander_ds.distributed import collectives, process_group
from lander_ds.inference.decoding import Decoder, Hypothesis
from lander_ds.inference.translations import (
    Alternative,
    PartialTranslations,
    Translation,
    write_translations,
)

logger = logging.getLogger(__name__)


class InferenceModel(Protocol):
    """A model that can translate; `lander_ds.inference.open` opens them."""

    model: PreTrainedModel
    """In eval mode, on this rank's device."""

    def pair(self, pair: str) -> AbstractContextManager[None]:
        """Within this context every token belongs to `pair`."""


@dataclass(frozen=True)
class Request:
    """One sentence to translate."""

    id: str
    """Identifier of the sentence, unique within its pair."""
    src: str
    """Source text."""
    ref: str
    """Reference translation."""
    prompt: tuple[int, ...]
    """Token ids that the model continues."""
    stop: str = ""
    """Text that ends the translation, beside line ends and end tokens; the same for every request of a pair."""
    doc: str | None = None
    """The document the sentence belongs to, where it is known."""


@dataclass(frozen=True)
class Work:
    """What one call of `translate` did, summed over ranks."""

    sentences: int
    """Sentences translated now; those found finished do not count."""
    tokens: int
    """Tokens generated for them."""
    truncated: int
    """How many of them were cut short at `max_new_tokens`."""
    seconds: float
    """Wall time."""


def translate(
    model: InferenceModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Mapping[str, Sequence[Request]],
    config: TranslateConfig,
    directory: Path,
    key: str,
    n_best: int = 1,
) -> Work:
    """Translate all requests that no earlier run has finished; write `directory/<pair>.jsonl` in their order.

    Called on every rank, with the same arguments.

    Args:
        model: the system.
        tokenizer: its tokenizer.
        requests: pair -> sentences in corpus order.
        config: decoding options.
        directory: where the system's translations lie.
        key: hash of everything that the translations depend on.
        n_best: how many translations of each sentence are kept; at most as many as there are beams, if it searches.
    """
    started = time.monotonic()
    partial = PartialTranslations(directory, key)
    # One rank looks, so that no rank sees what another has begun to write.
    finished = collectives.from_rank_zero({pair: set(partial.finished(pair)) for pair in requests})
    remaining = {
        pair: longest_first(r for r in requests[pair] if r.id not in finished[pair]) for pair in requests
    }
    done = sum(map(len, finished.values()))
    if done:
        logger.info("%s: going on after %d translated sentences", directory.name, done)
    sharded = config.weights == "sharded" and process_group.world_size() > 1
    decoder = Decoder(model.model, tokenizer, config, synced=sharded)
    mine = sum(len(collectives.share(pair_requests)) for pair_requests in remaining.values())
    counts = torch.zeros(3, dtype=torch.int64)
    with progress(f"translate {directory.name}", mine) as bar:
        for pair, pair_requests in remaining.items():
            if not pair_requests:
                continue
            with model.pair(pair), partial.appender(pair, process_group.rank()) as appender:
                prefix = decoder.shared_prefix([request.prompt for request in pair_requests])
                for batch in batches(pair_requests, config.batch_size, fill=sharded):
                    prompts = [request.prompt for request in batch.requests]
                    hypotheses = decoder.search(prompts, n_best, prefix, batch.requests[0].stop)
                    translations = [
                        _translation(request, best)
                        for request, best in zip(batch.requests, hypotheses, strict=True)
                    ][: batch.wanted]
                    appender.append(translations)
                    tokens, truncated = (t.tokens for t in translations), (t.truncated for t in translations)
                    counts += torch.tensor([len(translations), sum(tokens), sum(truncated)])
                    bar.advance(len(translations), pair)
    collectives.sum_over_ranks(counts)
    if process_group.rank() == 0:
        _merge(partial, requests, directory)
    collectives.barrier()
    sentences, tokens, truncated = counts.tolist()
    return Work(sentences, tokens, truncated, time.monotonic() - started)


def longest_first(requests: Iterable[Request]) -> list[Request]:
    """In the order in which they are translated."""
    return sorted(requests, key=lambda request: (-len(request.prompt), request.id))


def _translation(request: Request, best: Sequence[Hypothesis]) -> Translation:
    first = best[0]
    alternatives = tuple(Alternative(one.text, one.score) for one in best if one.score is not None)
    return Translation(
        *(request.id, request.src, request.ref, first.text, first.tokens, first.truncated),
        n_best=alternatives or None,
        doc=request.doc,
    )


@dataclass(frozen=True)
class Batch:
    """Sentences decoded together on one rank."""

    requests: tuple[Request, ...]
    """At least one."""
    wanted: int
    """How many of them count; 0 for a batch that only keeps this rank in step with the others."""


def batches(requests: Sequence[Request], size: int, fill: bool) -> Iterator[Batch]:
    """This rank's batches of one pair.

    Args:
        requests: all ranks' sentences, longest first; at least one.
        size: sentences per batch.
        fill: give every rank the same number of batches.
    """
    mine = collectives.share(requests)
    for start in range(0, len(mine), size):
        batch = tuple(mine[start : start + size])
        yield Batch(batch, len(batch))
    if fill:
        # Rank 0 has the most.
        most = math.ceil(math.ceil(len(requests) / process_group.world_size()) / size)
        for _ in range(most - math.ceil(len(mine) / size)):
            yield Batch((requests[-1],), 0)


def _merge(partial: PartialTranslations, requests: Mapping[str, Sequence[Request]], directory: Path) -> None:
    for pair, pair_requests in requests.items():
        done = partial.finished(pair)
        if missing := [request.id for request in pair_requests if request.id not in done]:
            raise ArtefactError(
                f"{directory}: {len(missing)} sentences of {pair} lack a translation, e.g. {missing[0]!r}: "
                "is run_dir the same, shared directory on every node?"
            )
        write_translations(directory / f"{pair}.jsonl", [done[request.id] for request in pair_requests])
    partial.discard(every=True)
