"""Finding or filling the cache of the frozen prefix (`train.prefix_cache: disk`) before the first step."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from lander_ds.common import console
from lander_ds.common.errors import ArtefactError
from lander_ds.common.files import json_hash, publish_entry
from lander_ds.data.batching.micro_batches import FILLER
from lander_ds.data.batching.packing import pack
from lander_ds.data.prefixes import (
    CHUNK_TOKENS,
    FORMAT,
    Layout,
    PartWriter,
    Prefixes,
    write_manifest,
    writers,
)
from lander_ds.data.prepared import PreparedData
from lander_ds.distributed import accelerator, collectives, process_group
from lander_ds.distributed.engines.single_span import SingleSpan
from lander_ds.distributed.start import Start
from lander_ds.training.session import Session

logger = logging.getLogger(__name__)


def open_prefixes(
    start: Start,
    session: Session,
    data: PreparedData,
    beat: Callable[[str], None],
    replay: PreparedData | None = None,
) -> Prefixes | None:
    """The kept hidden states of the training examples, computed where they are not there yet (collective).

    Args:
        start: recipe and base.
        session: the model, before its first step.
        data: the corpora.
        beat: told what is being done.
        replay: texts without a pair that are trained on as well; default: none.

    Returns: None where the recipe does not ask for them, or nothing lies below the lowest trained layer.

    Raises:
        ArtefactError: they cannot be written.
    """
    recipe = start.recipe
    if recipe.train.prefix_cache == "off":
        return None
    layer, model = session.model.prefix_layers, session.model.model
    if layer == 0:
        logger.info("train.prefix_cache: layer 0 is trained, there is nothing below it to keep")
        return None
    train = data.split("train")
    splits = [train[pair] for pair in recipe.data.pairs]
    contents = [data.content_hash("train")]
    if replay is not None:
        splits += replay.split("train").values()
        contents.append(replay.content_hash("train"))
    width = int(model.config.hidden_size)
    digest = json_hash(
        [
            *(FORMAT, CHUNK_TOKENS, *contents, list(recipe.data.pairs), layer),
            *(session.fingerprint, recipe.model.dtype, accelerator.device().type),
            *(torch.__version__, transformers.__version__),
            *filter(None, [recipe.model.quantize]),
        ]
    )
    cache = start.run.cache(recipe.data.cache_dir)
    entry = cache / f"prefix-{digest[:20]}"
    row_bytes = width * model.dtype.itemsize
    ranks = collectives.from_rank_zero(writers(entry, digest, row_bytes))
    if ranks is None:
        ranks = process_group.world_size()
        layout = Layout(splits, ranks)
        _fill(entry, digest, layout, session, layer, row_bytes, beat)
    else:
        layout = Layout(splits, ranks)
    logger.info(
        "hidden states below layer %d: %.2f GB in %s", layer, sum(layout.rows) * row_bytes / 1e9, entry
    )
    return Prefixes(entry, layout, layer, width, model.dtype)


def _fill(
    entry: Path,
    digest: str,
    layout: Layout,
    session: Session,
    layer: int,
    row_bytes: int,
    beat: Callable[[str], None],
) -> None:
    """Compute every chunk once, on all ranks together.

    Raises:
        ArtefactError: there is too little space, or writing fails on any rank.
    """
    engine, rank, ranks = session.engine, process_group.rank(), process_group.world_size()
    # The recipe's check refuses pipelines.
    assert isinstance(engine, SingleSpan)
    temporary = _begin(entry, sum(layout.rows) * row_bytes)
    try:
        writer, chunks = PartWriter(temporary, rank), len(layout.bounds) - 1
        with console.progress("hidden states below the trained layers", chunks) as bar:
            for first in range(0, chunks, ranks):
                beat(f"computing hidden states below layer {layer}")
                examples = layout.chunk(first + rank)
                # Every rank calls the model equally often.
                batch = pack(examples or [FILLER]).to(accelerator.device())
                hidden = engine.hidden_states(batch, layer)
                if examples:
                    writer.add(hidden.cpu())
                bar.advance(min(ranks, chunks - first))
        writer.close()
        for failure in collectives.gather_objects(writer.failure):
            if failure is not None:
                raise _unwritable(entry, failure)
        if rank == 0:
            write_manifest(temporary, digest, layout)
            temporary.chmod(0o755)
            # Another run may have been quicker; its entry holds the same.
            publish_entry(temporary, entry, lambda: writers(entry, digest, row_bytes) is not None)
        collectives.barrier()
    finally:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)


def _begin(entry: Path, size: int) -> Path:
    """A directory to write into, the same on every rank (collective).

    Raises:
        ArtefactError: it cannot be made, or there are fewer than `size` bytes free.
    """
    directory, refusal = "", ""
    if process_group.rank() == 0:
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(entry.parent).free
            if free < size:
                refusal = f"{size / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free"
            else:
                directory = tempfile.mkdtemp(prefix=f".{entry.name}.", suffix=".tmp", dir=entry.parent)
        except OSError as error:
            refusal = str(error)
    directory, refusal = collectives.from_rank_zero((directory, refusal))
    if refusal:
        raise _unwritable(entry, refusal)
    return Path(directory)


def _unwritable(entry: Path, reason: str) -> ArtefactError:
    return ArtefactError(
        f"{entry}: hidden states cannot be kept there: {reason}: make space, set data.cache_dir, or set "
        "train.prefix_cache: off"
    )
