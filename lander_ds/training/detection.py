"""Detection: the frozen base runs over the detection data, and every FFN neuron's statistics are collected."""

from __future__ import annotations

import itertools

from lander_ds.common import console
from lander_ds.data.batching.micro_batches import micro_batches_for, packed
from lander_ds.data.batching.packing import PackedBatch
from lander_ds.data.batching.plan import GlobalBatch
from lander_ds.data.prepared import PreparedSplit
from lander_ds.distributed import accelerator, collectives
from lander_ds.distributed.parallel_dims import parallel_dims
from lander_ds.distributed.start import Start
from lander_ds.distributed.watchdog import Watchdog
from lander_ds.method.collector import StatisticsCollector
from lander_ds.models.loading import build
from lander_ds.models.translation_model import BatchTotals
from lander_ds.training.spreading import spread


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
    dims = parallel_dims(recipe)
    ranks = dims.data_parallel_ranks
    count = micro_batches_for(int(batch.lengths.sum()), recipe.detect.batch_tokens, ranks)
    config = start.deepspeed_config(ranks, micro_batches=1)
    model, family = build(recipe.model)
    model.requires_grad_(False)
    engine = spread(recipe, config, dims, model, family, detect=True)
    # Now, because quantising has put other modules in their place.
    projections = family.down_projections(model)
    span = engine.model.span
    # The loss is summed, not averaged: then awareness does not depend on how the data was cut.
    totals = BatchTotals(target_tokens=1, examples=1)
    own = {layer: projections[layer] for layer in range(span.start, span.stop)}
    with (
        StatisticsCollector(
            own, len(projections), pairs=len(splits), device=accelerator.device()
        ) as collector,
        console.progress("detect", count) as bar,
    ):
        micro_batches = itertools.count(1)

        def announce(one: PackedBatch) -> None:
            collector.set_pairs(one.pair_ids)
            bar.advance()
            if watchdog is not None:
                watchdog.beat(f"micro-batch {next(micro_batches)} of {count}")

        engine.model.announce = announce
        rank = dims.data_parallel_rank
        micro = packed(batch, splits, rank, ranks, count, accelerator.device())
        engine.differentiate(list(micro), totals)
        collector.reduce(collectives.sum_over_ranks)
    engine.destroy()
    return collector
