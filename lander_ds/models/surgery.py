"""Putting routed FFNs into an HF model and taking them out again; both are exact.

Works on real tensors and on `meta` tensors alike. Every bank parameter remembers which rows or columns of
which base tensor it holds (`Slice`), so that a model built on `meta` can be filled from files and a trained
one written back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from lander_ds.common.errors import ArtefactError, ModelError
from lander_ds.config.schema.method import RoutingConfig
from lander_ds.method.selection import LayerSelection, Selection
from lander_ds.models.experts import ExpertLinear, Experts, sizes_by_expert
from lander_ds.models.family import Family, FFNPaths
from lander_ds.models.routed_ffn import BankFFN, Gate, RoutedFFN, replace, substitute

OPTIONS = ("gate", "gate_init", "gate_eval", "other_pairs")


@dataclass(frozen=True)
class Slice:
    """Where a parameter's values stand in the base model."""

    tensor: str
    """Name of the base tensor, e.g. `model.layers.8.mlp.up_proj.weight`."""
    dim: int | None
    """0: the parameter is rows of it, 1: columns, None: single entries, counted in the flattened tensor."""
    neurons: torch.Tensor
    """[n] int64 indices along `dim`."""
    shape: torch.Size
    """Shape of the base tensor."""

    def take(self, whole: torch.Tensor) -> torch.Tensor:
        """The parameter's values from the base tensor's."""
        source, dim = (whole.reshape(-1), 0) if self.dim is None else (whole, self.dim)
        return source.index_select(dim, self.neurons.to(whole.device))

    def put(self, whole: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Write the parameter's values into the (contiguous) base tensor, and return that."""
        target, dim = (whole.view(-1), 0) if self.dim is None else (whole, self.dim)
        target.index_copy_(dim, self.neurons.to(whole.device), values)
        return whole


def install(
    model: PreTrainedModel, family: Family, selection: Selection, routing: RoutingConfig, seed: int
) -> None:
    """Replace the FFNs of the selected layers by routed ones of the same weights; freeze all but the gates.

    Args:
        model: the HF model, on any device or on meta.
        family: its family.
        selection: layers and banks.
        routing: gate options.
        seed: initial values of the gates depend on it and on the layer alone.

    Raises:
        ArtefactError: the selection does not fit the model.
        ModelError: an FFN of a form that cannot be split.
    """
    layers, f = family.layers_of(model), family.neurons(model)
    if any(layer.layer >= len(layers) for layer in selection.layers) or f != selection.neurons:
        raise ArtefactError(
            f"the selection is for {selection.neurons} neurons per layer and layers "
            f"{[layer.layer for layer in selection.layers]}; this model has {f} neurons and {len(layers)} "
            "layers: run stages detect and select for this model"
        )
    if getattr(model.config, "slow_but_exact", False) and getattr(model.config, "pretraining_tp", 1) > 1:
        raise ModelError(
            "slow_but_exact with pretraining_tp > 1 is not supported: set slow_but_exact false in config.json"
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    options = {key: value for key, value in asdict(routing).items() if key in OPTIONS}
    for chosen in selection.layers:
        layer, index = layers[chosen.layer], chosen.layer
        projections = _projections(layer, f"{family.decoder}.{family.layers}.{index}", family.ffn)
        up, down = projections["up"][1], projections["down"][1]
        banks = _banks(projections, chosen, selection, family.ffn.fused)
        router = None if routing.gate == "none" else _new_gate(up.weight, routing.hidden, seed, index)
        activation = layer.get_submodule(family.ffn.activation)
        output_bias = None if down.bias is None else down.bias.data
        routed = RoutedFFN(index, banks, activation, output_bias, router, options, selection.pairs)
        if routed.output_bias is not None:
            everything = torch.arange(len(routed.output_bias))
            name = f"{projections['down'][0]}.bias"
            mark(routed.output_bias, Slice(name, 0, everything, routed.output_bias.shape))
        _put_in(layer, family.ffn, routed)


Projections = dict[str, tuple[str, nn.Linear | ExpertLinear]]
"""Role (up, down, gate) -> base name and module."""


def _projections(layer: nn.Module, name: str, paths: FFNPaths) -> Projections:
    projections: Projections = {}
    for role, path in (("up", paths.up), ("down", paths.down), ("gate", paths.gate)):
        if path is not None:
            module = layer.get_submodule(path)
            if not isinstance(module, nn.Linear | ExpertLinear):
                raise ModelError(
                    f"{name}.{path}: expected a linear projection, found {type(module).__name__}"
                )
            projections[role] = (f"{name}.{path}", module)
    if "gate" in projections and any(module.bias is not None for _, module in projections.values()):
        raise ModelError(
            f"{name}: a gated FFN with biases (mlp_bias) is not supported; use a base model without them"
        )
    return projections


def _banks(
    projections: Projections, chosen: LayerSelection, selection: Selection, fused: bool
) -> list[BankFFN]:
    """One module per bank, each parameter marked with its slice of the base; `fused`: as `FFNPaths.fused`."""
    # Role in the bank -> base name, base tensor, dimension of the neurons.
    bases: dict[str, tuple[str, torch.Tensor, int]] = {
        role: (f"{name}.weight", module.weight.data, 1 if role == "down" else 0)
        for role, (name, module) in projections.items()
    }
    name, up = projections["up"]
    experts = up.experts if isinstance(up, ExpertLinear) else 0
    if up.bias is not None:
        bases["bias"] = (f"{name}.bias", up.bias.data, 0)
    banks = []
    for bank, own in zip(chosen.banks, chosen.slices(), strict=True):
        # Expert by expert, so that those of each lie together.
        neurons = own.sort().values if experts else own
        cuts = {
            role: Slice(
                base, dim, neurons + selection.neurons if fused and role == "up" else neurons, tensor.shape
            )
            for role, (base, tensor, dim) in bases.items()
        }
        values = {role: cut.take(bases[role][1]) for role, cut in cuts.items()}
        owners = [selection.pairs.index(pair) for pair in bank.owners]
        sizes = sizes_by_expert(neurons, selection.neurons // experts, experts) if experts else ()
        module = BankFFN(bank.kind, owners, **values, experts=sizes)
        module.group = bank.group
        for role, cut in cuts.items():
            mark(module.get_parameter(role), cut)
        banks.append(module)
    return banks


def mark(parameter: nn.Parameter, cut: Slice) -> None:
    """Note where a parameter's values stand in the base model."""
    parameter.lander_slice = cut  # type: ignore[attr-defined]


def _put_in(layer: nn.Module, paths: FFNPaths, routed: RoutedFFN) -> None:
    routed.train(layer.training)
    if paths.block is not None:
        # Kept for `remove`, without its weights.
        routed.replaced = (layer.get_submodule(paths.block),)
        for path in paths.projections:
            replace(layer, path, nn.Identity())
    substitute(layer, asdict(paths), routed)


def _new_gate(like: torch.Tensor, hidden: int, seed: int, layer: int) -> Gate:
    """A gate whose logit is 0 for every token: w2 = 0 and b2 = 0. w1 is drawn by (seed, layer)."""
    d = like.shape[1]
    generator = torch.Generator().manual_seed(seed * 1_000_003 + layer)
    w1 = torch.randn(hidden, d, generator=generator) / math.sqrt(d)
    gate = Gate(w1, torch.zeros(hidden), torch.zeros(1, hidden), torch.zeros(1)).to(dtype=like.dtype)
    return gate if like.is_meta else gate.to(like.device)


def routed_ffns(model: nn.Module) -> Iterator[tuple[str, RoutedFFN]]:
    """Names and routed FFNs of a model, by layer."""
    for name, module in model.named_modules():
        if isinstance(module, RoutedFFN):
            yield name, module


def banks_of(routed: RoutedFFN) -> list[BankFFN]:
    """The banks of a routed FFN, in the order of the selection."""
    return [bank for bank in routed.banks if isinstance(bank, BankFFN)]


def used_shares(model: nn.Module) -> dict[int, float]:
    """id of a parameter of experts -> the share of them that a token is sent to."""
    shares: dict[int, float] = {}
    for module in model.modules():
        experts = module
        if isinstance(module, RoutedFFN) and module.replaced:
            (experts,) = module.replaced
        if isinstance(experts, Experts):
            own = module.banks if isinstance(module, RoutedFFN) else module
            assert isinstance(own, nn.Module)
            shares.update((id(p), experts.choices / experts.experts) for p in own.parameters())
    return shares


def gradient_elements(parameter: nn.Parameter) -> int:
    """Elements of the matrix whose gradient the backward pass computes for a trained parameter; 0 for vectors. For single
    entries that is the whole matrix they stand in."""
    cut: Slice | None = getattr(parameter, "lander_slice", None)
    if cut is not None and cut.dim is None:
        return cut.shape.numel()
    return parameter.numel() if parameter.dim() > 1 else 0


def slices(model: nn.Module) -> dict[str, Slice]:
    """Parameter name -> where its values stand in the base model, for everything surgery has cut."""
    return {
        name: parameter.lander_slice
        for name, parameter in model.named_parameters()
        if hasattr(parameter, "lander_slice")
    }


def restored(tensors: dict[str, torch.Tensor], cuts: dict[str, Slice]) -> dict[str, torch.Tensor]:
    """Base tensors put together again from bank tensors: the inverse permutation.

    Args:
        tensors: parameter name -> values.
        cuts: `slices` of the model they come from; together they cover every neuron once.

    Returns: base tensor name -> tensor, on the device of its parts.
    """
    whole: dict[str, torch.Tensor] = {}
    for name, cut in cuts.items():
        values = tensors[name]
        if cut.tensor not in whole:
            whole[cut.tensor] = torch.empty(cut.shape, dtype=values.dtype, device=values.device)
        cut.put(whole[cut.tensor], values)
    return whole


def remove(model: PreTrainedModel, family: Family) -> None:
    """Take the routed FFNs out: plain HF modules with the banks' weights in base order, gates dropped."""
    layers, paths = family.layers_of(model), family.ffn
    for _, routed in list(routed_ffns(model)):
        layer = layers[routed.layer]
        tensors = {name: parameter.data for name, parameter in routed.named_parameters()}
        whole = restored(tensors, slices(routed))
        if paths.block is not None:
            replace(layer, paths.block, routed.replaced[0])
        for path in paths.projections:
            base = f"{family.decoder}.{family.layers}.{routed.layer}.{path}"
            projection: nn.Module = _linear(whole[f"{base}.weight"], whole.get(f"{base}.bias"))
            if experts := len(banks_of(routed)[0].experts):
                weight = projection.get_parameter("weight")
                projection = ExpertLinear(weight, experts, int(path == paths.down))
            replace(layer, path, projection)
        replace(layer, paths.activation, routed.activation)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
