"""Stage detect: base model + detection data -> awareness.safetensors. One pass, no weight gradient."""

from __future__ import annotations

import logging

from lander_ds.config.loading import section
from lander_ds.data.batching.micro_batches import whole_split
from lander_ds.data.prepared import PreparedData
from lander_ds.distributed import process_group
from lander_ds.distributed.start import Start
from lander_ds.distributed.watchdog import Watchdog
from lander_ds.method.awareness import AwarenessMetadata
from lander_ds.stages.stage import Part, Result, Stage
from lander_ds.training.detection import collect

logger = logging.getLogger(__name__)


def _parts(start: Start) -> list[Part]:
    """One part: the awareness of every FFN neuron for every pair; none where `train.start_from` brings the selection."""
    recipe, run = start.recipe, start.run
    if recipe.train.start_from is not None:
        logger.info("detect: not needed: the selection is that of train.start_from")
        return []
    data = PreparedData.load(run, recipe)
    options = {**section(recipe, "detect"), **recipe.model.numerics}
    inputs = {"data": data.content_hash("detect"), "base": start.base_fingerprint}
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
            data_hash=data.content_hash("detect"),
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
