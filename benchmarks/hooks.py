"""Faults that come from inside a rank: called on it before the command line."""

from __future__ import annotations

import math
import os
import signal
import time
from typing import Any

import torch

from lander_ds.checkpoint import writer
from lander_ds.data.batching.packing import PackedBatch
from lander_ds.models.loss import LossHead
from lander_ds.models.translation_model import TranslationModel
from lander_ds.training.saver import Saver
from lander_ds.training.trainer import Trainer

HANGS_AT = 5
"""Step (from 1) in which `hang` hangs."""
SAVE_SECONDS = 1.0
"""What a save takes longer with `signal_while_saving`."""
SKIPPED = (4, 5)
"""Steps whose gradients `bad_gradients` spoils."""
BAD_PAIR = 1
"""Position in the recipe's pairs of the one whose losses `bad_pair` spoils."""


def hang(rank: int) -> None:
    """Rank 1 sleeps for ever before a step."""
    step = Trainer._step

    def sleeping(self: Trainer, number: int, stop: bool) -> object:
        while rank == 1 and number + 1 == HANGS_AT:
            time.sleep(1.0)
        return step(self, number, stop)

    Trainer._step = sleeping  # type: ignore[method-assign, assignment]


def signal_while_saving(rank: int) -> None:
    """Checkpoints take a second to write; when training has ended, and only the last one is waited for, another SIGTERM
    comes."""
    write, finish = writer._write_part, Saver.finish

    def slowly(*arguments: Any) -> None:
        time.sleep(SAVE_SECONDS)
        write(*arguments)

    def interrupted(self: Saver) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        finish(self)

    writer._write_part = slowly
    Saver.finish = interrupted  # type: ignore[method-assign]


def bad_gradients(rank: int) -> None:
    """On rank 1, two steps' gradients hold infinities."""
    now = [0]
    step = Trainer._step

    def counting(self: Trainer, number: int, stop: bool) -> object:
        if now[0] == 0 and rank == 1:
            for parameter in self.session.model.parameters():
                if parameter.requires_grad:
                    parameter.register_hook(lambda g: g * math.inf if now[0] in SKIPPED else g)
        now[0] = number + 1
        return step(self, number, stop)

    Trainer._step = counting  # type: ignore[method-assign, assignment]


def bad_pair(rank: int) -> None:
    """Losses of one pair are not numbers, as with a broken corpus."""
    forward, head = TranslationModel.forward, LossHead.forward
    pairs: list[torch.Tensor] = []

    def telling(self: TranslationModel, batch: PackedBatch, *rest: object, **options: object) -> object:
        pairs[:] = [batch.pair_ids[batch.target_positions]]
        return forward(self, batch, *rest, **options)

    def spoilt(self: LossHead, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        losses: torch.Tensor = head(self, hidden, targets)
        return torch.where(pairs[0] == BAD_PAIR, losses * math.nan, losses)

    TranslationModel.forward = telling  # type: ignore[method-assign, assignment]
    LossHead.forward = spoilt  # type: ignore[method-assign]
