"""The module that DeepSpeed wraps: packed micro-batch in, token-normalised loss out.

It runs the HF decoder piece by piece (see `families.family`), so that nothing is padded, logits exist at target
positions alone, and layers below the first trained one build no graph.

Shapes: T tokens, N target tokens, E examples, M pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from lander_ds.data.packing import PackedBatch
from lander_ds.families.family import Family
from lander_ds.routing.routed_ffn import RoutingState
from lander_ds.training.loss import LossHead

SEED_STRIDE = 0x9E3779B97F4A7C15
"""Odd constant that spreads small seeds over all bits (golden ratio times 2^64)."""


@dataclass(frozen=True)
class Normaliser:
    """What a micro-batch's sums are divided by, so that losses do not depend on how the global batch was cut."""

    target_tokens: int
    """Target tokens of the global batch."""
    examples: int
    """Examples of the global batch."""


class TranslationModel(nn.Module):
    """A decoder-only HF model with a translation loss."""

    def __init__(
        self,
        model: PreTrainedModel,
        family: Family,
        pairs: int,
        state: RoutingState | None = None,
        budget_weight: float = 0.0,
        budget: float = 0.5,
        seed: int = 0,
        input_gradients: bool = False,
    ) -> None:
        """Wrap.

        Args:
            model: the HF model, after surgery if there is one.
            family: its family.
            pairs: M.
            state: the routing state of a routed model.
            budget_weight, budget: weight and p of the budget loss.
            seed: of the gate noise.
            input_gradients: build the graph from the embeddings on although nothing is trained (detection needs
                gradients of activations, not of weights).
        """
        super().__init__()
        self.model = model
        self.family = family
        self.pairs = pairs
        self.state = state
        self.budget_weight, self.budget = budget_weight, budget
        self.seed = seed
        self.input_gradients = input_gradients
        self.head = LossHead(model.get_output_embeddings(), family.softcap(model))
        self.first_trained = 0 if input_gradients else first_trained_layer(model, family)

    def forward(
        self, batch: PackedBatch, norm: Normaliser
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss of one micro-batch.

        Args:
            batch: the packed micro-batch.
            norm: sizes of the global batch.

        Returns:
            scalar: target loss / norm.target_tokens (+ budget loss); summed over all micro-batches and ranks it is
            the loss of the global batch.
            [2, M] float64: sum of losses (nats) and target tokens per pair.
            [] float64: budget loss of this micro-batch (already divided), before its weight.
        """
        losses, specific_share = self._token_losses(batch)
        total = losses.sum() / norm.target_tokens
        budget = total.new_zeros(())
        if self.budget_weight > 0.0 and specific_share is not None:
            # Per example, so that the value does not depend on which examples share a micro-batch. A filler
            # (sample id -1) is no example.
            real = (batch.sample_ids >= 0).to(specific_share.dtype)
            budget = ((specific_share - self.budget).abs() * real).sum() / norm.examples
            total = total + self.budget_weight * budget
        per_pair = torch.zeros(2, self.pairs, dtype=torch.float64, device=losses.device)
        owners = batch.pair_ids[batch.target_positions]
        per_pair[0].index_add_(0, owners, losses.detach().double())
        per_pair[1].index_add_(0, owners, torch.ones_like(losses, dtype=torch.float64))
        return total, per_pair, budget.detach().double()

    def _token_losses(self, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Losses [N] and, when the budget needs it, the mean of 1 - c over tokens and routed layers, [E]."""
        family, model = self.family, self.model
        shares = self._begin_routing(batch)
        decoder = family.decoder_of(model)
        positions = batch.positions.unsqueeze(0)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.first_trained == 0):
            hidden = family.embed(decoder, batch.input_ids.unsqueeze(0), positions)
            if self.input_gradients and torch.is_grad_enabled():
                hidden = hidden.detach().requires_grad_()
        arguments = family.layer_arguments(decoder, hidden, positions, batch.segment_lengths)
        for index, layer in enumerate(family.layers_of(model)):
            with torch.set_grad_enabled(torch.is_grad_enabled() and index >= self.first_trained):
                hidden = family.run_layer(layer, hidden, arguments(index))
        hidden = family.finish(model, hidden[0].index_select(0, batch.target_positions))
        losses = self.head(hidden, batch.targets)
        if not shares:
            return losses, None
        lengths = torch.tensor(batch.segment_lengths, device=losses.device)
        return losses, torch.stack(shares).sum(0) / (len(shares) * lengths)

    def _begin_routing(self, batch: PackedBatch) -> list[torch.Tensor] | None:
        state = self.state
        if state is None:
            return None
        state.begin(batch.pair_ids)
        state.segment_ids = batch.segment_ids
        state.examples = len(batch.segment_lengths)
        state.specific_share = [] if self.budget_weight > 0.0 else None
        # A sample id is drawn once in a run, so it stands for the step too.
        keys = (batch.sample_ids[batch.segment_ids] << 24) + batch.positions
        state.noise_keys = keys ^ (self.seed * SEED_STRIDE % (1 << 62))
        return state.specific_share


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
