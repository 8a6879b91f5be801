"""Stage detect: base model + detection data -> awareness.safetensors. One pass, no weight gradient."""

from __future__ import annotations

import itertools
import logging

from lander_ds.common import console
from lander_ds.config.loading import section
from lander_ds.data.batching.micro_batches import micro_batches_for, packed, whole_split
from lander_ds.data.batching.packing import PackedBatch
from lander_ds.data.batching.plan import GlobalBatch
from lander_ds.data.prepared import PreparedData, PreparedSplit
from lander_ds.distributed import collectives, process_group
from lander_ds.distributed.parallel_dims import layout, open_engine, reads_weights, span_of
from lander_ds.distributed.start import Start
from lander_ds.distributed.watchdog import Watchdog
from lander_ds.method.awareness import AwarenessMetadata
from lander_ds.method.collector import StatisticsCollector
from lander_ds.models.loading import Placement, build, fill
from lander_ds.models.translation_model import BatchTotals, TranslationModel
from lander_ds.models.weights import BaseWeights
from lander_ds.stages.stage import Part, Result, Stage

logger = logging.getLogger(__name__)


def _parts(start: Start) -> list[Part]:
    """One part: the awareness of every FFN neuron for every pair."""
    recipe, run = start.recipe, start.run
    data = PreparedData.load(run, recipe)
    options = {**section(recipe, "detect"), "dtype": recipe.model.dtype}
    inputs = {"data": data.hash, "base": start.base_fingerprint}
    return [Part("detect", options, inputs, lambda: _detect(start, data))]


STAGE = Stage("detect", _parts)
run = STAGE.run


def _detect(start: Start, data: PreparedData) -> Result:
    recipe, run, pairs = start.recipe, start.run, start.recipe.data.pairs
    by_pair = data.split("detect")
    splits = [by_pair[pair] for pair in pairs]
    batch = whole_split(dict(enumerate(splits)), recipe.detect.examples)
    with Watchdog(run.path / "stalled", recipe.train.stall_seconds, "detect") as watchdog:
        collector = collect(start, splits, batch, watchdog)
    sentences = {pair: int((batch.pair_ids == m).sum()) for m, pair in enumerate(pairs)}
    awareness = collector.finish(
        pairs,
        AwarenessMetadata(
            base_fingerprint=start.base_fingerprint,
            sentences=sentences,
            target_tokens={pair: int(batch.target_tokens_per_pair[m]) for m, pair in enumerate(pairs)},
            data_hash=data.hash,
        ),
    )
    if process_group.rank() == 0:
        awareness.save(run.awareness)
    logger.info(
        "wrote %s: %d sentences, %d target tokens",
        run.awareness,
        sum(sentences.values()),
        batch.target_tokens,
    )
    return Result([run.awareness])


def collect(
    start: Start, splits: list[PreparedSplit], batch: GlobalBatch, watchdog: Watchdog | None = None
) -> StatisticsCollector:
    """Run the frozen base over `batch` and sum the statistics over all ranks (collective).

    Args:
        start: model, topology, DeepSpeed JSON and tokens per micro-batch.
        splits: detection data by pair id.
        batch: which examples.
        watchdog: told of every micro-batch.
    """
    recipe = start.recipe
    grid = layout(recipe)
    count = micro_batches_for(int(batch.lengths.sum()), recipe.detect.batch_tokens, grid.data_ranks)
    config = start.deepspeed_config(grid.data_ranks, micro_batches=1)
    model, family = build(recipe.model)
    projections = family.down_projections(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    span = span_of(recipe, model, family, grid, everything=True)

    def make_model(place: Placement) -> TranslationModel:
        weights = BaseWeights(recipe.model.path, recipe.model.allow_pickle)
        fill(model, family, weights, place, span=span, reads=reads_weights(recipe, grid))
        return TranslationModel(model, family, len(splits), span=span, input_gradients=True)

    engine = open_engine(recipe, config, make_model, lambda: None)
    # The loss is summed, not averaged: then awareness does not depend on how the data was cut.
    norm = BatchTotals(target_tokens=1, examples=1)
    own = {layer: projections[layer] for layer in range(span.start, span.stop)}
    with (
        StatisticsCollector(
            own, len(projections), pairs=len(splits), device=process_group.device()
        ) as collector,
        console.progress("detect", count) as bar,
    ):
        micro_batches = itertools.count(1)

        def announce(micro: PackedBatch) -> None:
            collector.set_pairs(micro.pair_ids)
            bar.advance()
            if watchdog is not None:
                watchdog.beat(f"micro-batch {next(micro_batches)} of {count}")

        engine.model.announce = announce
        engine.differentiate(
            list(packed(batch, splits, grid.data_rank, grid.data_ranks, count, process_group.device())), norm
        )
        collector.reduce(collectives.sum_over_ranks)
    engine.destroy()
    return collector
