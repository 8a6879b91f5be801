"""What a recipe's model consists of, from its config.json alone: parameters by name, group and place, without weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from lander_ds.common.errors import ArtefactError
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.recipe import Recipe
from lander_ds.config.schema.method import BankChoice, SelectConfig
from lander_ds.distributed.balance import costs_of, cut
from lander_ds.method.ownership import group_of
from lander_ds.method.select import divide
from lander_ds.method.selection import Selection
from lander_ds.models.family import Family
from lander_ds.models.loading import build, tied_parameters
from lander_ds.models.parameter_groups import mark_trained, prepare_model
from lander_ds.models.quantization import quantized_bytes, quantized_parameters
from lander_ds.models.span import Span, spans, units, whole
from lander_ds.models.surgery import gradient_elements, used_shares
from lander_ds.models.translation_model import first_trained_layer
from lander_ds.training.session import METHODS_WITH_SELECTION

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tensor:
    """A parameter."""

    name: str
    elements: int
    product: int
    """Elements that a token is multiplied by: 0 for norms and biases, of experts those that it is sent to."""
    group: str | None
    """Parameter group; None: frozen."""
    shape: tuple[int, ...]
    gradient: int
    """Elements of the matrix whose gradient a token adds to; 0 for what is frozen or no matrix."""
    quantized: int | None
    """Bytes of its codes and scales; None: it is held in the type of the weights."""

    @property
    def trained(self) -> bool:
        """Whether the optimizer updates it."""
        return self.group is not None


@dataclass(frozen=True)
class Anatomy:
    """A model on meta, in the shape in which it is trained."""

    recipe: Recipe
    model: PreTrainedModel
    family: Family
    selection: Selection | None
    """Of the run, or estimated; None for methods without one."""
    estimated: bool
    """The selection is an estimate."""
    groups: dict[int, str]
    """id of a trained parameter -> its group."""

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return len(self.family.layers_of(self.model))

    @property
    def item_bytes(self) -> int:
        """Bytes per element of the weights."""
        return int(self.model.dtype.itemsize)

    @property
    def width(self) -> int:
        """d."""
        return int(self.model.config.hidden_size)

    @cached_property
    def head(self) -> nn.Parameter:
        """[V, w] matrix of the head."""
        weight = self.model.get_output_embeddings().weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @cached_property
    def first_trained(self) -> int:
        """Lowest decoder layer that has a backward pass."""
        return first_trained_layer(self.model, self.family)

    @cached_property
    def shares(self) -> dict[int, float]:
        """id of a parameter of experts -> the share of them that a token is sent to."""
        return used_shares(self.model)

    @cached_property
    def quantized(self) -> set[int]:
        """ids of the parameters that training holds quantised."""
        if self.recipe.model.quantize is None:
            return set()
        layers = self.family.layers_of(self.model)
        return {id(parameter) for layer in layers for parameter in quantized_parameters(layer)}

    @cached_property
    def whole(self) -> Span:
        """The span of the model that is not cut."""
        return whole(self.model, self.family)

    def tensors(self, span: Span) -> list[Tensor]:
        """The parameters of a span, tied ones once where both are in it."""
        tied = tied_parameters(self.model) if span.first and span.last else {}
        tensors: dict[int, Tensor] = {}
        for unit_name, unit in units(self.model, self.family, span):
            for local, parameter in unit.named_parameters():
                name = f"{unit_name}.{local}"
                if name not in tied:
                    tensors.setdefault(id(parameter), self._tensor(name, parameter))
        return list(tensors.values())

    def layer(self, index: int) -> list[Tensor]:
        """The parameters of a decoder layer."""
        prefix = f"{self.family.decoder}.{self.family.layers}.{index}."
        layer = self.family.layers_of(self.model)[index]
        return [self._tensor(prefix + name, parameter) for name, parameter in layer.named_parameters()]

    def _tensor(self, name: str, parameter: nn.Parameter) -> Tensor:
        shape = tuple(parameter.shape)
        group = self.groups.get(id(parameter))
        share = self.shares.get(id(parameter), 1.0)
        gradient = 0 if group is None else round(share * gradient_elements(parameter))
        product = round(share * parameter.numel()) if parameter.dim() > 1 else 0
        kind, quantized = self.recipe.model.quantize, None
        if kind is not None and id(parameter) in self.quantized:
            quantized = quantized_bytes(parameter.numel(), kind)
        return Tensor(name, parameter.numel(), product, group, shape, gradient, quantized)

    def stage_spans(self, stages: int) -> tuple[Span, ...]:
        """The spans of pipeline stages, cut as training cuts them (`parallel.topology.span_of`)."""
        if stages == 1:
            return (self.whole,)
        layers = self.family.layers_of(self.model)
        costs, of_head = costs_of(layers, self.head, self.recipe.train.activation_checkpointing)
        own = self.recipe.pipeline_cut
        return spans(own if len(own) == stages - 1 else cut(costs, of_head, stages), self.layers)


def anatomy(recipe: Recipe, attention: str | None = None) -> Anatomy:
    """The model that a recipe trains, on meta.

    Args:
        recipe: names the model; its selection is read from the run directory if there is one, else estimated.
        attention: name of another attention implementation than the trainer's.

    Raises:
        ModelError: config.json is missing or unfit.
        ArtefactError: the run's selection is damaged, or is for other pairs or another model.
        ConfigError: nothing is left to train.
    """
    model, family = build(recipe.model) if attention is None else build(recipe.model, attention)
    selection, estimated = None, False
    if recipe.train.method in METHODS_WITH_SELECTION:
        selection, estimated = _selection(recipe, len(family.layers_of(model)), family.neurons(model))
    prepare_model(model, family, recipe, selection)
    groups = mark_trained(model, family, recipe.train, selection)
    by_id = {id(parameter): name for name, parameters in groups.items() for parameter in parameters}
    return Anatomy(recipe, model, family, selection, estimated, by_id)


def _selection(recipe: Recipe, layers: int, neurons: int) -> tuple[Selection, bool]:
    path = RunDirectory(recipe.run_dir).selection
    if path.exists():
        selection = Selection.load(path)
        if selection.pairs != recipe.data.pairs:
            raise ArtefactError(
                f"{path} is for pairs {', '.join(selection.pairs)}, the recipe's data.pairs are "
                f"{', '.join(recipe.data.pairs)}: run stages detect and select again, or plan with another run_dir"
            )
        if selection.neurons != neurons or any(layer.layer >= layers for layer in selection.layers):
            raise ArtefactError(
                f"{path} is for a model with {selection.neurons} neurons per layer; {Path(recipe.model.path)} has "
                f"{neurons} and {layers} layers: correct model.path, or plan with another run_dir"
            )
        return selection, False
    return estimated_selection(recipe.select, recipe.data.pairs, layers, neurons), True


def estimated_selection(select: SelectConfig, pairs: Sequence[str], layers: int, neurons: int) -> Selection:
    """A selection of the sizes that `select` leads to, before detection has run.

    Which layers `relevance`, `awareness` and `random` choose is not known: k of them, evenly spread from layer 0 on,
    which is the dearest case, because the gradient then goes through the whole model. With `scope: per_pair` no layer
    is taken to be chosen by two pairs. A share rho of the neurons that are not frozen is general, the rest divided
    evenly among the owners (pairs or languages). With `top`, every layer has its share of the neurons, and half of what an
    owner has is general.
    """
    chosen, k = select.layers, select.layers.k
    if chosen.criterion == "list":
        indices = sorted(chosen.layers)
    elif chosen.criterion == "all":
        indices = list(range(layers))
    elif chosen.criterion == "ends":
        first = min(k + 1, layers) // 2
        indices = sorted({*range(first), *range(max(first, layers - k // 2), layers)})
    elif chosen.criterion == "last":
        indices = list(range(layers - min(k, layers), layers))
    else:
        count = min(layers, k * (len(pairs) if chosen.scope == "per_pair" else 1))
        indices = [index * layers // count for index in range(count)]
    owners = _owners(select.banks, pairs, neurons)
    return Selection(tuple(pairs), neurons, tuple(divide(index, owners, pairs) for index in indices), {})


def _owners(banks: BankChoice, pairs: Sequence[str], neurons: int) -> torch.Tensor:
    """[M, f] bool."""
    groups = [group_of(pair, banks.owners) for pair in pairs]
    names = list(dict.fromkeys(groups))
    frozen = int(banks.min_awareness * neurons)
    general = int(banks.rho * (neurons - frozen))
    if "top" in (banks.criterion, banks.like if banks.criterion == "random" else ""):
        each = max(1, int(banks.share * neurons))
        general = each // 2
        frozen = max(0, neurons - general - (each - general) * len(names))
    owners = torch.zeros(len(names), neurons, dtype=torch.bool)
    owners[:, :general] = True
    specific = torch.arange(general, neurons - frozen)
    # Neighbours in turn: every owner gets as many, give or take one.
    owners[specific % len(names), specific] = True
    return owners[[names.index(group) for group in groups]]
