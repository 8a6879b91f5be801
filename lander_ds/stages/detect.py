"""Stage detect: base model + detection data -> awareness.safetensors. One pass, no weight gradient."""

from __future__ import annotations

import logging
import time

from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.loading import section
from lander_ds.config.recipe import Recipe
from lander_ds.data.batching.micro_batches import whole_split
from lander_ds.data.prepared import PreparedData
from lander_ds.distributed import collectives, process_group
from lander_ds.distributed.watchdog import Watchdog
from lander_ds.method.awareness import AwarenessMetadata
from lander_ds.models.weights import base_fingerprint
from lander_ds.training.detection import collect

logger = logging.getLogger(__name__)


def run(recipe: Recipe, run: RunDirectory, force: bool = False) -> None:
    """Collect the awareness of every FFN neuron for every pair (collective)."""
    data = PreparedData.load(run, recipe)
    fingerprint = base_fingerprint(recipe.model.path)
    inputs = {"data": data.hash, "base": fingerprint}
    options = {**section(recipe, "detect"), "dtype": recipe.model.dtype}
    if collectives.from_rank_zero(
        process_group.rank() == 0 and not force and run.up_to_date("detect", options, inputs)
    ):
        logger.info("detect: up to date")
        return
    started = time.monotonic()
    held = data.split("detect")
    splits = [held[pair] for pair in recipe.data.pairs]
    batch = whole_split(dict(enumerate(splits)), recipe.detect.examples)
    with Watchdog(run.path / "stalled", recipe.train.stall_seconds, "detect") as watchdog:
        collector = collect(recipe, splits, batch, watchdog)
    pairs = recipe.data.pairs
    sentences = {pair: int((batch.pair_ids == m).sum()) for m, pair in enumerate(pairs)}
    awareness = collector.finish(
        pairs,
        AwarenessMetadata(
            base_fingerprint=fingerprint,
            sentences=sentences,
            target_tokens={pair: int(batch.target_tokens_per_pair[m]) for m, pair in enumerate(pairs)},
            data_hash=data.hash,
        ),
    )
    if process_group.rank() == 0:
        awareness.save(run.awareness)
        run.record("detect", options, inputs, [run.awareness], time.monotonic() - started)
        logger.info(
            "wrote %s: %d sentences, %d target tokens",
            run.awareness,
            sum(sentences.values()),
            batch.target_tokens,
        )
    collectives.barrier()
