"""Stage select: awareness -> selection. Seconds, and no model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import get_args

from lander_ds.checkpoint.checkpoint import SELECTION, Checkpoint
from lander_ds.checkpoint.earlier_run import earlier_checkpoint
from lander_ds.common.files import file_hash
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.loading import section
from lander_ds.distributed.start import Start
from lander_ds.method.awareness import Awareness
from lander_ds.method.select import build_selection
from lander_ds.method.selection import BankKind, LayerSelection, Selection
from lander_ds.stages.stage import Part, Result, Stage

logger = logging.getLogger(__name__)


def _parts(start: Start) -> list[Part]:
    """One part: layers and banks chosen from `awareness.safetensors`, written to `selection.safetensors`; or those of the
    run that `train.start_from` names.

    The order of the pairs in the recipe defines the pair ids, whatever their order in the awareness.

    Raises:
        ArtefactError: the awareness is missing, damaged, or was collected for other pairs.
        ConfigError: `select` asks for something this awareness cannot give.
    """
    recipe, run = start.recipe, start.run
    if recipe.train.start_from is not None:
        return [_of_earlier_run(run, earlier_checkpoint(recipe.train.start_from))]
    awareness = Awareness.load(run.awareness).reordered(recipe.data.pairs)
    inputs = {"awareness": file_hash(run.awareness)}
    shield: Awareness | None = None
    if recipe.select.shield.awareness is not None:
        path = Path(recipe.select.shield.awareness)
        shield, inputs["shield"] = Awareness.load(path), file_hash(path)

    def select() -> Result:
        selection = build_selection(awareness, recipe.select, recipe.seed, shield)
        selection.save(run.selection)
        for line in table(selection):
            logger.info(line)
        for remark in selection.metadata["remarks"]:
            logger.warning(remark)
        return Result([run.selection])

    options = {**section(recipe, "select", "seed"), "pairs": list(recipe.data.pairs)}
    return [Part("select", options, inputs, select)]


def _of_earlier_run(run: RunDirectory, earlier: Checkpoint) -> Part:
    def take_over() -> Result:
        selection = earlier.selection()
        if selection is None:
            return Result([])
        selection.save(run.selection)
        logger.info("the selection is that of %s", earlier.path)
        return Result([run.selection])

    recorded = earlier.state["files"].get(SELECTION)
    inputs = {"start_from": "none" if recorded is None else recorded["sha256"]}
    return Part("select", {}, inputs, take_over)


STAGE = Stage("select", _parts)
run = STAGE.run


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
