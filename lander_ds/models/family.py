"""What the trainer must know of an HF model family: where its FFN lies, how its decoder runs piece by piece.

One small description per family lies in `catalogue.py`. The pieces (embed, layers, finish, head) are the HF
modules themselves; only the few lines of glue between them that differ between families are written here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lander_ds.common.errors import ModelError
from lander_ds.models.attention import Segments
from lander_ds.models.routed_ffn import GateSink, Routing, routed

LayerArguments = Callable[[int], dict[str, Any]]
"""Decoder layer index -> keyword arguments of that layer."""


@dataclass(frozen=True)
class FFNPaths:
    """Where the parts of the FFN lie inside a decoder layer (dotted module paths)."""

    up: str
    """In-projection whose rows are neurons (of a gated FFN: the ungated one)."""
    down: str
    """Out-projection whose columns are neurons; its input is h."""
    activation: str
    """The non-linearity."""
    gate: str | None = None
    """Gating in-projection of a gated FFN. The same path as `up`: one matrix [2 f, d] has the rows of both, the gating ones
    first (Phi-3)."""
    block: str | None = None
    """Module that takes x (experts take what the router says of it too) and returns the FFN output and nothing else:
    the routed FFN replaces it. None: the
    FFN is spread in the layer (OPT) or adds the residual itself (BLOOM): the routed FFN replaces `up`, while
    `activation` and `down` become identities."""

    @property
    def fused(self) -> bool:
        """Whether one matrix is both in-projections."""
        return self.gate == self.up

    @property
    def projections(self) -> tuple[str, ...]:
        """Paths of all projections, each once."""
        return tuple(dict.fromkeys(filter(None, (self.up, self.gate, self.down))))


@dataclass(frozen=True)
class Family:
    """One family of decoder-only HF models.

    Shapes: T tokens of one packed row, d hidden width. Hidden states are [1, T, d], positions [1, T].
    """

    name: str
    """Key in the catalogue."""
    model_types: tuple[str, ...]
    """`model_type` values of config.json that belong to the family."""
    decoder: str
    """Path of the module that holds embeddings, layers and final norm, e.g. `model`."""
    embeddings: str
    """Path of the token embedding inside the decoder."""
    layers: str
    """Path of the list of layers inside the decoder."""
    final: tuple[str, ...]
    """Names of what follows the last layer inside the decoder (norm, projection), in order; missing ones are
    skipped."""
    ffn: FFNPaths
    """The FFN inside a layer."""
    embed: Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
    """(decoder, input_ids [1, T], positions [1, T]) -> hidden [1, T, d]."""
    layer_arguments: Callable[[nn.Module, torch.Tensor, torch.Tensor, Segments], LayerArguments]
    """(decoder, hidden, positions, examples of the row) -> arguments per layer."""
    packed_attention: bool = True
    """The layers take their attention from transformers' attention interface; False: they compute it themselves, and
    `layer_arguments` sees to it that they do so inside examples (BLOOM)."""
    logit_factor: Callable[[Any], float] | None = None
    """HF configuration -> what the head's output is multiplied by (Cohere, Granite)."""
    renamed: tuple[tuple[str, str], ...] = ()
    """(part of a tensor's name in the model, that part on disk), where transformers renames on loading."""

    def decoder_of(self, model: PreTrainedModel) -> nn.Module:
        """The module that holds embeddings, layers and final norm."""
        decoder = model.get_submodule(self.decoder)
        assert isinstance(decoder, nn.Module)
        return decoder

    def layers_of(self, model: PreTrainedModel) -> nn.ModuleList:
        """The decoder layers."""
        layers = self.decoder_of(model).get_submodule(self.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def embeddings_of(self, model: PreTrainedModel) -> nn.Module:
        """The token embedding."""
        return self.decoder_of(model).get_submodule(self.embeddings)

    def down_projections(self, model: PreTrainedModel) -> list[nn.Module]:
        """The out-projection of every layer; its input is h (only before surgery)."""
        return [layer.get_submodule(self.ffn.down) for layer in self.layers_of(model)]

    def run_layer(
        self,
        layer: nn.Module,
        hidden: torch.Tensor,
        arguments: dict[str, Any],
        routing: Routing,
        gates: GateSink | None = None,
    ) -> torch.Tensor:
        """One decoder layer: hidden [1, T, d] -> hidden [1, T, d].

        Args:
            layer, hidden, arguments: what is run on what.
            routing: for its FFN, if that is routed.
            gates: gets the values of its gate, if it has one.
        """
        with routed(routing, gates):
            output = layer(hidden, **arguments)
        hidden = output[0] if isinstance(output, tuple) else output
        return hidden

    def finish(self, model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
        """What follows the last layer, up to the head, whose factor is in it already: [..., d] -> [..., head width]."""
        decoder = self.decoder_of(model)
        for path in self.final:
            module = getattr(decoder, path, None)
            if module is not None:
                hidden = module(hidden)
        return hidden if self.logit_factor is None else hidden * self.logit_factor(model.config)

    def check_layers(self, model: PreTrainedModel) -> None:
        """Refuse layers without the FFN of the family.

        Raises:
            ModelError: naming the first one.
        """
        for index, layer in enumerate(self.layers_of(model)):
            if self.ffn.up not in dict(layer.named_modules()):
                raise ModelError(
                    f"layer {index} has no {self.ffn.up}: models with layers of several kinds (mlp_only_layers or "
                    "decoder_sparse_step in config.json) are not supported; use another base model"
                )

    def softcap(self, model: PreTrainedModel) -> float | None:
        """Softcap of the final logits, if the family has one."""
        value = getattr(model.config, "final_logit_softcapping", None)
        return None if value is None else float(value)

    def neurons(self, model: PreTrainedModel) -> int:
        """f, neurons per FFN (only before surgery)."""
        weight = self.layers_of(model)[0].get_submodule(self.ffn.up).weight
        assert isinstance(weight, torch.Tensor)
        return int(weight.shape[0]) // (1 + self.ffn.fused)
