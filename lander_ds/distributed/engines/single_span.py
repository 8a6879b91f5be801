"""Steps of the topologies in which every rank runs the whole model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lander_ds.data.batching.packing import PackedBatch
from lander_ds.distributed import process_group
from lander_ds.distributed.engines.engine import Engine
from lander_ds.distributed.engines.figures import Figures
from lander_ds.models.translation_model import BatchTotals, GateStatistics


class SingleSpan(Engine):
    """Mixin of engines without pipeline stages: DeepSpeed's forward, backward and step per micro-batch."""

    def train_step(
        self,
        batches: Sequence[PackedBatch],
        totals: BatchTotals,
        alpha: float = 0.0,
        gates: GateStatistics | None = None,
    ) -> Figures:
        """One optimizer step over this rank's micro-batches."""
        engine, figures = self._engine, Figures.nothing(self.model)
        engine.train()
        for batch in batches:
            loss, per_pair, budget = engine(batch, totals, alpha=alpha, gates=gates)
            # DeepSpeed averages gradients over data-parallel ranks; the loss is normalised over all of them already.
            engine.backward(loss * process_group.world_size(), scale_wrt_gas=False)
            engine.step()
            figures.add(per_pair, budget)
        return figures

    @torch.no_grad()
    def evaluate(self, batches: Sequence[PackedBatch], totals: BatchTotals) -> Figures:
        """Forward passes alone."""
        figures = Figures.nothing(self.model)
        self._engine.eval()
        for batch in batches:
            _, per_pair, budget = self._engine(batch, totals)
            figures.add(per_pair, budget)
        return figures

    @torch.no_grad()
    def hidden_states(self, batch: PackedBatch, layer: int) -> torch.Tensor:
        """What comes into decoder layer `layer`, in evaluation mode: [T, d]."""
        self._engine.eval()
        (hidden,) = self._engine(batch, BatchTotals(1, 1), until=layer)
        states: torch.Tensor = hidden[0]
        return states

    def differentiate(self, batches: Sequence[PackedBatch], totals: BatchTotals) -> None:
        """Forward and backward passes without optimizer."""
        self._engine.eval()
        for batch in batches:
            # Not through the engine's forward: without an optimizer it refuses every backward pass. ZeRO-3 gathers
            # and releases weights by hooks on the modules themselves, and without ZeRO-3 there is nothing to gather.
            loss, _, _ = self._engine.module(batch, totals)
            loss.backward()
