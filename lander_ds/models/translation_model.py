"""The module that DeepSpeed wraps: packed micro-batch in, token-normalised loss out; the whole model or a span of it.

It runs the HF decoder piece by piece (see `models.family`), so that nothing is padded, logits exist at target
positions alone, layers below the first trained one build no graph, and a pipeline stage runs the same code as a
whole model.

Shapes: T tokens, N target tokens, E examples, M pairs, d hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lander_ds.data.batching.packing import PackedBatch
from lander_ds.models.attention import Segments
from lander_ds.models.family import Family
from lander_ds.models.loss import LossHead
from lander_ds.models.preference import FIGURES, Preference, contrast
from lander_ds.models.routed_ffn import Routing
from lander_ds.models.span import Span, units, whole
from lander_ds.models.surgery import routed_ffns

SEED_STRIDE = 0x9E3779B97F4A7C15
"""Odd constant that spreads small seeds over all bits (golden ratio times 2^64)."""

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class BatchTotals:
    """What a micro-batch's sums are divided by, so that losses do not depend on how the global batch was cut."""

    target_tokens: int
    """Target tokens of the global batch."""
    examples: int
    """Examples of the global batch."""
    preferences: int = 0
    """Those of them that have a worse translation too."""


@dataclass(frozen=True)
class Objective:
    """What is minimised besides the cross-entropy or in its place, and what the gate noise depends on."""

    budget_weight: float = 0.0
    """Weight of the budget loss."""
    budget: float = 0.5
    """p of the budget loss."""
    seed: int = 0
    """Of the gate noise."""
    preference: Preference | None = None
    """Minimised in place of the cross-entropy."""


class GateStatistics:
    """Sums over the tokens of a step's micro-batches on this rank, by routed layer."""

    def __init__(self) -> None:
        self.sums: dict[int, torch.Tensor] = {}
        """[2, M] float64: sums of gate values c, and token counts, per pair."""

    def add(self, layer: int, sums: torch.Tensor) -> None:
        """Count a micro-batch: decoder layer and [2, M]."""
        self.sums[layer] = self.sums.get(layer, 0.0) + sums


class GateReport:
    """Takes the gate values c [T, 1] of one decoder layer on one micro-batch, and keeps what is wanted of them."""

    def __init__(self, batch: PackedBatch, pairs: int, statistics: bool, budget: bool) -> None:
        self._batch, self._pairs, self._statistics, self._budget = batch, pairs, statistics, budget
        self.sums: torch.Tensor | None = None
        """[2, M] float64: sums of c, and token counts, per pair; padding left out."""
        self.share: torch.Tensor | None = None
        """[E]: sums of 1 - c over the tokens of each example, with gradients."""

    def __call__(self, c: torch.Tensor) -> None:
        """Add them up."""
        batch = self._batch
        if self._statistics:
            values = c.detach().squeeze(-1).double()
            # Padding (-1) gets a column of its own: to leave it out, the host would have to wait for its number.
            columns = batch.pair_ids % (self._pairs + 1)
            sums = torch.zeros(2, self._pairs + 1, dtype=torch.float64, device=c.device)
            sums[0].index_add_(0, columns, values)
            sums[1].index_add_(0, columns, torch.ones_like(values))
            self.sums = sums[:, :-1]
        if self._budget:
            share = torch.zeros(len(batch.segment_lengths), dtype=c.dtype, device=c.device)
            self.share = share.index_add(0, batch.segment_ids, 1.0 - c.squeeze(-1))


class TranslationModel(nn.Module):
    """A span of a decoder-only HF model with, at its end, a translation loss.

    Between spans travel the hidden states [1, T, d] and, when the budget loss needs it, how much of each example the
    gates below sent to specific neurons ([E] float32, sum of 1 - c over tokens and routed layers).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        family: Family,
        pairs: int,
        objective: Objective | None = None,
        span: Span | None = None,
        input_gradients: bool = False,
        recompute: bool = False,
    ) -> None:
        """Wrap.

        Args:
            model: the HF model, after surgery if there is one; outside the span its parameters may be on meta.
            family: its family.
            pairs: M.
            objective: default: cross-entropy alone.
            span: the part that is computed here; default: everything.
            input_gradients: build the graph from the embeddings on although nothing is trained (detection needs
                gradients of activations, not of weights).
            recompute: keep only the input of each decoder layer and compute its activations again when its gradient
                is needed (activation checkpointing).
        """
        super().__init__()
        self.family = family
        self.pairs = pairs
        self.objective = objective or Objective()
        self.span = span or whole(model, family)
        self.input_gradients = input_gradients
        self.recompute = recompute
        self.announce: Callable[[PackedBatch], None] | None = None
        """Told of every micro-batch before its forward pass."""
        self.first_trained = 0 if input_gradients else first_trained_layer(model, family)
        # In a tuple, so that parts on meta that other stages hold are no submodules.
        self._skeleton = (model,)
        self.parts = nn.ModuleList(unit for _, unit in units(model, family, self.span))
        self.head: LossHead | None = None
        if self.span.last:
            self.head = LossHead(model.get_output_embeddings(), family.softcap(model))
        self.routed_layers = sorted(routed.layer for _, routed in routed_ffns(model))
        """Decoder layers with a routed FFN, of the whole model."""
        self.gated = any(routed.router is not None for _, routed in routed_ffns(model))
        """Whether they have gates."""

    @property
    def model(self) -> PreTrainedModel:
        """The whole HF model; outside the span its parameters may be on meta."""
        return self._skeleton[0]

    @property
    def prefix_layers(self) -> int:
        """How many decoder layers come before everything that is trained or routed: their hidden states depend on
        the base and the example alone."""
        return min([self.first_trained, *self.routed_layers])

    @property
    def budgeted(self) -> bool:
        """Whether the loss holds a budget."""
        return self.objective.budget_weight > 0.0 and self.gated

    @property
    def figures(self) -> int:
        """R, sums per pair that a forward pass returns."""
        return 2 + (0 if self.objective.preference is None else FIGURES)

    @property
    def has_backward(self) -> bool:
        """Whether a backward pass has anything to do in this span."""
        return self.span.last or self.first_trained < self.span.stop

    def crosses(self, layer: int) -> bool:
        """Whether gradients flow down into the layers below decoder layer `layer`."""
        return self.first_trained < layer

    def carried(self, batch: PackedBatch) -> list[torch.Tensor]:
        """Empty tensors of the shapes that come in from the span before."""
        device = batch.input_ids.device
        width = int(self.model.config.hidden_size)
        hidden = torch.empty(1, len(batch.input_ids), width, dtype=self.model.dtype, device=device)
        if not self._shares_below(self.span.start):
            return [hidden]
        return [hidden, torch.empty(len(batch.segment_lengths), dtype=torch.float32, device=device)]

    def _shares_below(self, layer: int) -> bool:
        return self.budgeted and self.routed_layers[0] < layer

    def forward(
        self,
        batch: PackedBatch,
        totals: BatchTotals,
        *incoming: torch.Tensor,
        alpha: float = 0.0,
        gates: GateStatistics | None = None,
        until: int | None = None,
    ) -> Tensors:
        """One micro-batch through the span.

        Args:
            batch: the packed micro-batch.
            totals: sizes of the global batch.
            incoming: what the span before returned; nothing for the first.
            alpha: weight of the gate noise.
            gates: counts the gate values of this pass.
            until: stop before this decoder layer and return what comes into it.

        Returns: of a span that is not the last, what travels on. Of the last:
            scalar: target loss / totals.target_tokens (+ budget loss); summed over all micro-batches and data-parallel
            ranks it is the loss of the global batch. With an `Objective.preference`: its weight of that, and preference
            loss / totals.preferences.
            [R, M + 1] float64: sum of losses (nats) and target tokens per pair, and of texts without one; without rejected
            translations. With a preference also `Contrast.sums`.
            [] float64: budget loss of this micro-batch (already divided), before its weight.
        """
        if self.announce is not None:
            self.announce(batch)
        start, stop = self.span.start, self.span.stop if until is None else until
        if incoming:
            hidden = incoming[0]
        elif batch.prefix is not None:
            hidden, start = batch.prefix.unsqueeze(0), batch.prefix_layers
        else:
            hidden = self._embed(batch)
        share = incoming[1] if len(incoming) > 1 else None
        routing = self.routing(batch, alpha)
        hidden, share = self._layers(batch, range(start, stop), routing, gates, hidden, share)
        if not self.span.last or until is not None:
            return (hidden,) if share is None else (hidden, share)
        return self._finish(batch, totals, hidden, share)

    def routing(self, batch: PackedBatch, alpha: float) -> Routing:
        """What the routed FFNs need to know of a micro-batch; `alpha`: weight of the gate noise."""
        # A sample id is drawn once in a run, so it stands for the step too.
        keys = (batch.sample_ids[batch.segment_ids] << 24) + batch.positions
        return Routing(batch.pair_ids, keys ^ (self.objective.seed * SEED_STRIDE % (1 << 62)), alpha)

    def _embed(self, batch: PackedBatch) -> torch.Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.first_trained == 0):
            decoder = self.family.decoder_of(self.model)
            hidden = self.family.embed(decoder, batch.input_ids.unsqueeze(0), batch.positions.unsqueeze(0))
            if self.input_gradients and torch.is_grad_enabled():
                hidden = hidden.detach().requires_grad_()
        return hidden

    def _layers(
        self,
        batch: PackedBatch,
        layers: range,
        routing: Routing,
        gates: GateStatistics | None,
        hidden: torch.Tensor,
        share: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        decoder, positions = self.family.decoder_of(self.model), batch.positions.unsqueeze(0)
        segments = Segments(batch.segment_lengths, batch.boundaries)
        arguments = self.family.layer_arguments(decoder, hidden, positions, segments)
        for index in layers:
            with torch.set_grad_enabled(torch.is_grad_enabled() and index >= self.first_trained):
                run = partial(self._layer, index, arguments(index), batch, routing, gates is not None)
                if self.recompute and torch.is_grad_enabled():
                    # Reentrant, because ZeRO-3's sharded weights have other shapes when the recomputation ends than
                    # the other kind expects. It needs an input that requires a gradient.
                    hidden = hidden if hidden.requires_grad else hidden.detach().requires_grad_()
                    hidden, added, sums = checkpoint(
                        run, hidden, use_reentrant=True, preserve_rng_state=False
                    )
                else:
                    hidden, added, sums = run(hidden)
            if added is not None:
                share = added if share is None else share + added
            if gates is not None and sums is not None:
                gates.add(index, sums)
        return hidden, share

    def _layer(
        self,
        index: int,
        arguments: dict[str, object],
        batch: PackedBatch,
        routing: Routing,
        statistics: bool,
        hidden: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """One decoder layer: hidden [1, T, d] -> hidden [1, T, d], and share and sums of its `GateReport`.

        It changes nothing but its results, so that it may be run again in the backward pass.
        """
        report = GateReport(batch, self.pairs, statistics, self.budgeted)
        layer = self.family.layers_of(self.model)[index]
        hidden = self.family.run_layer(layer, hidden, arguments, routing, report)
        return hidden, report.share, report.sums

    def _finish(
        self, batch: PackedBatch, totals: BatchTotals, hidden: torch.Tensor, share: torch.Tensor | None
    ) -> Tensors:
        assert self.head is not None
        targets = hidden[0].index_select(0, batch.target_positions)
        losses = self.head(self.family.finish(self.model, targets), batch.targets)
        preference, compared = self.objective.preference, None
        counted = torch.ones_like(losses, dtype=torch.float64)
        if preference is None:
            total = losses.sum() / totals.target_tokens
        else:
            compared = contrast(losses, batch, preference.beta, self.pairs)
            counted = (~compared.of_rejected).double()
            losses = losses.masked_fill(compared.of_rejected, 0.0)
            total = preference.likelihood * losses.sum() / totals.target_tokens
            total = total + compared.losses.sum() / max(1, totals.preferences)
        budget = total.new_zeros(())
        if share is not None:
            # Per example, so that the value does not depend on which examples share a micro-batch. A filler
            # (sample id -1) is no example.
            mean = share / (len(self.routed_layers) * batch.boundaries.diff())
            real = (batch.sample_ids >= 0).to(mean.dtype)
            budget = ((mean - self.objective.budget).abs() * real).sum() / (
                totals.examples + totals.preferences
            )
            total = total + self.objective.budget_weight * budget
        per_pair = torch.zeros(2, self.pairs + 1, dtype=torch.float64, device=losses.device)
        owners = batch.pair_ids[batch.target_positions] % (self.pairs + 1)
        per_pair[0].index_add_(0, owners, losses.detach().double())
        per_pair[1].index_add_(0, owners, counted)
        if compared is not None:
            per_pair = torch.cat([per_pair, compared.sums])
        return total, per_pair, budget.detach().double()


def first_trained_layer(model: PreTrainedModel, family: Family) -> int:
    """Lowest decoder layer with a trained parameter; 0 when something before the layers is trained; the number of
    layers when only what follows them is."""
    layers = family.layers_of(model)
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    after = {id(p) for path in family.final for p in _parameters(family.decoder_of(model), path)}
    head = model.get_output_embeddings()
    embedding = {id(parameter) for parameter in family.embeddings_of(model).parameters()}
    after |= {id(parameter) for parameter in head.parameters()} - embedding
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in inside and id(parameter) not in after:
            return 0
    for index, layer in enumerate(layers):
        if any(parameter.requires_grad for parameter in layer.parameters()):
            return index
    return len(layers)


def _parameters(decoder: nn.Module, path: str) -> list[nn.Parameter]:
    module = getattr(decoder, path, None)
    return [] if module is None else list(module.parameters())
