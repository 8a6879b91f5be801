"""The method in plain PyTorch, written from its formulas and from nothing of the training room.

One process, transformers' own model, one example at a time, full-size weights; which neurons learn from a pair is
a mask over rows and columns; AdamW is written out, with step counts per element.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

from lander_ds.config.recipe import Recipe
from lander_ds.data.batching.plan import BatchPlan
from lander_ds.data.prepared import PreparedData, PreparedSplit
from lander_ds.method.selection import Selection

ROLES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


@dataclass
class Trained:
    """One trained tensor of full size, what may change in it, and its optimizer state."""

    parameter: torch.Tensor
    owned: Callable[[int], torch.Tensor]
    """Pair id -> 0/1 mask, broadcastable: the elements that learn from the pair's tokens."""
    rate: torch.Tensor
    """Peak learning rate per element; 0 where frozen."""
    gradient: torch.Tensor = field(init=False)
    first: torch.Tensor = field(init=False)
    second: torch.Tensor = field(init=False)
    count: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.rate = self.rate.expand_as(self.parameter)
        self.gradient, self.first, self.second, self.count = (
            torch.zeros_like(self.parameter) for _ in range(4)
        )


class Reference:
    """A training of LLaMA-like models (gated FFN without biases)."""

    def __init__(self, recipe: Recipe, data: PreparedData, selection: Selection) -> None:
        self.recipe, self.selection = recipe, selection
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            recipe.model.path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.model.requires_grad_(False)
        splits = data.split("train")
        self.splits: list[PreparedSplit] = [splits[pair] for pair in recipe.data.pairs]
        self.plan = BatchPlan(
            [split.lengths for split in self.splits],
            [split.target_lengths for split in self.splits],
            batch_tokens=recipe.train.batch_tokens,
            temperature=recipe.train.temperature,
            seed=recipe.seed,
        )
        self.pair = 0
        self.shares: list[torch.Tensor] = []
        self.gate_values: dict[tuple[int, int], list[torch.Tensor]] = {}
        self.trained: dict[str, Trained] = {}
        {"lander": self._banks, "layers": self._layers, "full": self._everything}[recipe.train.method]()
        for entry in self.trained.values():
            entry.parameter.requires_grad_(True)

    def _everything(self) -> None:
        for name, parameter in self.model.named_parameters():
            self._add(name, parameter, lambda pair: torch.ones(()), self.recipe.train.lr.dense)

    def _layers(self) -> None:
        for chosen in self.selection.layers:
            for role in ROLES.values():
                name = f"model.layers.{chosen.layer}.mlp.{role}.weight"
                weight = self.model.get_parameter(name)
                self._add(name, weight, lambda pair: torch.ones(()), self.recipe.train.lr.dense)

    def _banks(self) -> None:
        lr, banks = self.recipe.train.lr, self.recipe.train.banks
        pairs, f = self.recipe.data.pairs, self.selection.neurons
        for chosen in self.selection.layers:
            rate, owned = torch.zeros(f), torch.zeros(len(pairs), f)
            general, specific = torch.zeros(f), torch.zeros(len(pairs), f)
            for bank, neurons in zip(chosen.banks, chosen.slices(), strict=True):
                owners = [pairs.index(owner) for owner in bank.owners]
                for pair in owners:
                    (general if bank.kind == "general" else specific[pair])[neurons] = 1.0
                if bank.kind in banks:
                    rate[neurons] = lr.general if bank.kind == "general" else lr.specific
                    for pair in owners:
                        owned[pair, neurons] = 1.0
            for role, projection in ROLES.items():
                name = f"model.layers.{chosen.layer}.mlp.{projection}.weight"
                # Neurons are the rows of gate and up and the columns of down.
                self._add(
                    name,
                    self.model.get_parameter(name),
                    lambda pair, o=owned, r=role: o[pair][None, :] if r == "down" else o[pair][:, None],  # type: ignore[misc]
                    rate[None, :] if role == "down" else rate[:, None],
                )
            self._route(chosen.layer, general, specific)

    def _route(self, layer: int, general: torch.Tensor, specific: torch.Tensor) -> None:
        """Routed forward of a layer's FFN; masks general [f] and specific [M, f]."""
        routing, mlp = self.recipe.routing, self.model.get_submodule(f"model.layers.{layer}.mlp")
        others = (specific.sum(0) > 0).float()
        gate: dict[str, torch.Tensor] = {}
        if routing.gate != "none":
            generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + layer)
            d = mlp.up_proj.weight.shape[1]
            gate = {
                "w1": torch.randn(routing.hidden, d, generator=generator) / math.sqrt(d),
                "b1": torch.zeros(routing.hidden),
                "w2": torch.zeros(1, routing.hidden),
                "b2": torch.zeros(1),
            }
            for name, value in gate.items():
                entry = f"router.{layer}.{name}"
                self._add(entry, value, lambda pair: torch.ones(()), self.recipe.train.lr.gates)

        def forward(x: torch.Tensor) -> torch.Tensor:
            mine = specific[self.pair]
            scale = torch.ones(())
            if gate:
                inner = torch.relu(x @ gate["w1"].T + gate["b1"])
                c = torch.sigmoid(inner @ gate["w2"].T + gate["b2"])
                self.gate_values.setdefault((layer, self.pair), []).append(c.detach().flatten())
                self.shares.append((1 - c).mean())
                factor = 2.0 if routing.gate_init == "preserve" else 1.0
                scale = factor * c * general + factor * (1 - c) * mine + (1 - general - mine)
            before, after = (scale, 1.0) if routing.gate == "input" else (1.0, scale)
            g, u = (x @ mlp.gate_proj.weight.T) * before, (x @ mlp.up_proj.weight.T) * before
            h = mlp.act_fn(g) * u * after
            if routing.other_pairs == "mask":
                h = h * (1 - others * (1 - mine))
            return h @ mlp.down_proj.weight.T

        mlp.forward = forward

    def _add(
        self, name: str, parameter: torch.Tensor, owned: Callable[[int], torch.Tensor], rate: Any
    ) -> None:
        self.trained[name] = Trained(parameter, owned, torch.as_tensor(rate, dtype=torch.float32))

    def train(self) -> list[dict[str, Any]]:
        """All steps; one record per step."""
        return [self._step(step) for step in range(self.recipe.train.steps)]

    def _step(self, step: int) -> dict[str, Any]:
        batch, pairs = self.plan.batch(step), self.recipe.data.pairs
        for entry in self.trained.values():
            entry.gradient.zero_()
        losses = torch.zeros(len(pairs), dtype=torch.float64)
        budget = 0.0
        self.gate_values.clear()
        for number in range(len(batch)):
            self.pair = int(batch.pair_ids[number])
            self.shares.clear()
            total, penalty = self._example(int(batch.indices[number]))
            losses[self.pair] += float(total.detach())
            loss = total / batch.target_tokens
            if self.recipe.routing.budget_weight:
                budget += float(penalty.detach()) / len(batch)
                loss = loss + self.recipe.routing.budget_weight * penalty / len(batch)
            self._accumulate(loss)
        norm = math.sqrt(sum(float(e.gradient.double().square().sum()) for e in self.trained.values()))
        clip = self.recipe.train.clip
        if clip and norm > clip:
            for entry in self.trained.values():
                entry.gradient *= clip / norm
        self._update(step, sorted(set(batch.pair_ids.tolist())))
        counts = batch.target_tokens_per_pair
        return {
            "loss": float(losses.sum()) / batch.target_tokens,
            "loss_per_pair": {p: float(losses[i]) / counts[i] for i, p in enumerate(pairs) if counts[i]},
            "budget_loss": budget,
            "grad_norm": norm,
            "gates": {
                f"{layer} {pairs[pair]}": float(torch.cat(values).mean())
                for (layer, pair), values in self.gate_values.items()
            },
        }

    def _example(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed loss of the target tokens, and |mean(1 - c) - p|."""
        ids, prompt = self.splits[self.pair].tokens(index)
        tokens = torch.tensor(ids, dtype=torch.int64)
        logits = self.model(tokens[None]).logits[0]
        loss = functional.cross_entropy(logits[prompt - 1 : -1], tokens[prompt:], reduction="sum")
        share = torch.stack(self.shares).mean() if self.shares else torch.zeros(())
        return loss, (share - self.recipe.routing.budget).abs()

    def _accumulate(self, loss: torch.Tensor) -> None:
        entries = list(self.trained.values())
        grads = torch.autograd.grad(loss, [entry.parameter for entry in entries])
        for entry, grad in zip(entries, grads, strict=True):
            entry.gradient += grad * entry.owned(self.pair)

    @torch.no_grad()
    def _update(self, step: int, present: Sequence[int]) -> None:
        train = self.recipe.train
        progress = step / train.steps
        factor = {"constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[train.schedule]
        for entry in self.trained.values():
            # A neuron that no pair of the batch owns is left alone: no decay, no momentum, no step counted.
            touched = sum(entry.owned(pair) for pair in present).expand_as(entry.parameter) > 0  # type: ignore[union-attr]
            rate, g = entry.rate * factor, entry.gradient
            if train.optimizer == "sgd":
                new = entry.parameter - rate * (g + train.weight_decay * entry.parameter)
            else:
                beta, gamma = train.betas
                entry.first = torch.where(touched, beta * entry.first + (1 - beta) * g, entry.first)
                entry.second = torch.where(touched, gamma * entry.second + (1 - gamma) * g * g, entry.second)
                entry.count += touched
                m = entry.first / (1 - beta ** entry.count.double()).float()
                v = entry.second / (1 - gamma ** entry.count.double()).float()
                new = entry.parameter * (1 - rate * train.weight_decay) - rate * m / (v.sqrt() + train.eps)
            entry.parameter.copy_(torch.where(touched, new, entry.parameter))

    def weights(self) -> dict[str, torch.Tensor]:
        """Trained values under the names of a checkpoint."""
        if self.recipe.train.method != "lander":
            return {name: entry.parameter.detach() for name, entry in self.trained.items()}
        actual = {}
        for chosen in self.selection.layers:
            prefix = f"model.layers.{chosen.layer}.mlp"
            for number, (bank, neurons) in enumerate(zip(chosen.banks, chosen.slices(), strict=True)):
                for role, projection in ROLES.items():
                    weight = self.trained[f"{prefix}.{projection}.weight"].parameter.detach()
                    values = weight[:, neurons] if role == "down" else weight[neurons]
                    if bank.kind in self.recipe.train.banks:
                        actual[f"{prefix}.banks.{number}.{role}"] = values
            if self.recipe.routing.gate != "none":
                for name in ("w1", "b1", "w2", "b2"):
                    value = self.trained[f"router.{chosen.layer}.{name}"].parameter.detach()
                    actual[f"{prefix}.router.{name}"] = value
        return actual
