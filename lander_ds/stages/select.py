"""Stage select: awareness -> selection. Seconds, no model, on rank 0 only."""

from __future__ import annotations

import logging
import time
from typing import get_args

from lander_ds.common.files import file_hash
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.loading import section
from lander_ds.config.recipe import Recipe
from lander_ds.distributed import collectives, process_group
from lander_ds.method.awareness import Awareness
from lander_ds.method.select import build_selection
from lander_ds.method.selection import BankKind, LayerSelection, Selection

logger = logging.getLogger(__name__)


def run(recipe: Recipe, run: RunDirectory, force: bool = False) -> None:
    """Choose layers and banks from `awareness.safetensors` and write `selection.safetensors`.

    The order of the pairs in the recipe defines the pair ids, whatever their order in the awareness.

    Raises:
        ArtefactError: the awareness is missing, damaged, or was collected for other pairs.
        ConfigError: `select` asks for something this awareness cannot give.
    """
    if process_group.rank() == 0:
        _select(recipe, run, force)
    collectives.barrier()


def _select(recipe: Recipe, run: RunDirectory, force: bool) -> None:
    started = time.monotonic()
    awareness = Awareness.load(run.awareness).reordered(recipe.data.pairs)
    options = {**section(recipe, "select", "seed"), "pairs": list(recipe.data.pairs)}
    inputs = {"awareness": file_hash(run.awareness)}
    if not force and run.up_to_date("select", options, inputs):
        logger.info("select: up to date")
        return
    selection = build_selection(awareness, recipe.select, recipe.seed)
    selection.save(run.selection)
    for line in table(selection):
        logger.info(line)
    for remark in selection.metadata["remarks"]:
        logger.warning(remark)
    run.record("select", options, inputs, [run.selection], time.monotonic() - started)


def table(selection: Selection) -> list[str]:
    """Lines that show the bank sizes of every layer and the neurons each pair owns."""
    lines = ["   layer    banks  general specific   frozen"]
    for layer in selection.layers:
        figures = [layer.layer, len(layer.banks), *(_size(layer, kind) for kind in get_args(BankKind))]
        lines.append(" ".join(f"{figure:>8}" for figure in figures))
    banks = [bank for layer in selection.layers for bank in layer.banks]
    for pair in selection.pairs:
        owned = [bank for bank in banks if pair in bank.owners]
        specific = sum(bank.size for bank in owned if bank.kind == "specific")
        lines.append(f"{pair} owns {sum(bank.size for bank in owned)} neurons, {specific} of them specific")
    return lines


def _size(layer: LayerSelection, kind: BankKind) -> int:
    return sum(bank.size for bank in layer.banks if bank.kind == kind)
