"""A routed translation model for transformers: a plain HF model whose selected FFNs are routed.

An export directory carries this file, `routed_ffn.py`, `joined.py` and `experts.py`; nothing else is needed:

    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    model.generate(**inputs, pair="en-de")
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel

from .experts import unstack
from .routed_ffn import BankFFN, Gate, RoutedFFN, Routing, carrying, pair_id, routed, substitute


class LanderConfig(PretrainedConfig):
    """`base` is the HF configuration of the plain model, `routing` says where banks and gates are."""

    model_type = "lander"

    def __init__(
        self, base: dict[str, Any] | None = None, routing: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Keep both parts as plain JSON values."""
        self.base = base or {}
        self.routing = routing or {}
        super().__init__(**kwargs)

    def base_config(self) -> Any:
        """The plain model's configuration object."""
        values = {key: value for key, value in self.base.items() if key != "model_type"}
        return AutoConfig.for_model(self.base["model_type"], **values)


class LanderForCausalLM(PreTrainedModel, GenerationMixin):
    """The routed model. `forward` and `generate` take `pair` (e.g. "en-de"; "none" in a direction that it was not trained
    for) or `pair_ids`.

    The pair holds for that call and that thread alone: threads may translate different pairs at the same time.
    """

    config_class = LanderConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: LanderConfig) -> None:
        """Build the plain model and put routed FFNs into the selected layers."""
        # What the caller asked for; transformers fills in its own choice, which is not every family's, below.
        attention = getattr(config, "_attn_implementation", None)
        super().__init__(config)
        asked = {} if attention is None else {"attn_implementation": attention}
        # `from_pretrained` makes the type it was asked for the default while it builds; parts must follow it.
        self.model = AutoModelForCausalLM.from_config(
            config.base_config(), dtype=torch.get_default_dtype(), **asked
        )
        self._no_split_modules = self.model._no_split_modules
        # Trainer hands the number of items to models that take any keyword; the plain model decides.
        self.accepts_loss_kwargs = _takes_any_keyword(self.model.forward)
        unstack(self.model)
        routing = config.routing
        layers = self.model.get_submodule(routing["layers_path"])
        for entry in routing["layers"]:
            layer = layers[entry["layer"]]
            substitute(layer, routing["ffn"], self._routed_ffn(layer, entry))
        self.post_init()

    def _routed_ffn(self, layer: torch.nn.Module, entry: dict[str, Any]) -> RoutedFFN:
        routing = self.config.routing
        paths = routing["ffn"]
        up: Any = layer.get_submodule(paths["up"])
        down: Any = layer.get_submodule(paths["down"])
        d = up.weight.shape[1]
        banks = []
        for bank in entry["banks"]:
            size = bank["size"]
            owners = [routing["pairs"].index(pair) for pair in bank["owners"]]
            gate = None if paths["gate"] is None else torch.empty(size, d)
            bias = None if up.bias is None else torch.empty(size)
            banks.append(
                BankFFN(
                    bank["kind"],
                    owners,
                    torch.empty(size, d),
                    torch.empty(d, size),
                    gate,
                    bias,
                    bank.get("experts", ()),
                )
            )
        router = None
        if routing["options"]["gate"] != "none":
            hidden = routing["hidden"]
            router = Gate(torch.empty(hidden, d), torch.empty(hidden), torch.empty(1, hidden), torch.empty(1))
        output_bias = None if down.bias is None else torch.empty(d)
        activation = layer.get_submodule(paths["activation"])
        return RoutedFFN(
            entry["layer"], banks, activation, output_bias, router, routing["options"], routing["pairs"]
        )

    def _routing(self, pair: str | None, pair_ids: torch.Tensor | None) -> Routing:
        pairs = self.config.routing["pairs"]
        if pair is not None:
            # Layers may lie on several devices, or nowhere yet: each takes the ids to its own.
            pair_ids = torch.tensor(pair_id(pair, pairs))
        if pair_ids is None:
            raise ValueError(f"say which language pair: pair=..., one of {', '.join(pairs)}, or none")
        return Routing(pair_ids)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, **options: Any
    ) -> None:
        """A layer that is run again in the backward pass belongs to the pair of its forward pass."""

        def checkpointed(function: Any, *args: Any, **kwargs: Any) -> Any:
            return gradient_checkpointing_func(carrying(function), *args, **kwargs)

        super()._set_gradient_checkpointing(enable, checkpointed, **options)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        pair: str | None = None,
        pair_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Forward of the plain model with the routing of `pair`. Trainer keeps the columns that are named here.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, labels, kwargs: as of the plain
                model.
            pair: language pair of the whole batch.
            pair_ids: or int64 pair ids, [B] or [B, T].
        """
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
        }
        # Not every plain model has all of them.
        given = {name: value for name, value in named.items() if value is not None}
        with routed(self._routing(pair, pair_ids)):
            return self._called()(**given, **kwargs)

    def _called(self) -> Any:
        return self.model

    def generate(
        self, *args: Any, pair: str | None = None, pair_ids: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        """`generate` of the plain model with the routing of `pair`.

        Args:
            args, kwargs: as of the plain model.
            pair: language pair of the whole batch.
            pair_ids: or int64 pair ids [B].
        """
        # generation_config.json of the directory was read into this model, not into the plain one.
        self.model.generation_config = self.generation_config
        with routed(self._routing(pair, pair_ids)):
            return self.model.generate(*args, **kwargs)

    def get_input_embeddings(self) -> Any:
        """The plain model's token embedding."""
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        """The plain model's head."""
        return self.model.get_output_embeddings()

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the plain model's token embedding."""
        self.model.set_input_embeddings(value)

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Replace the plain model's head."""
        self.model.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """That of the plain model, whose new size is saved with this one."""
        embeddings = self.model.resize_token_embeddings(*args, **kwargs)
        self.config.vocab_size = self.config.base["vocab_size"] = self.model.config.vocab_size
        return embeddings


class LanderModel(LanderForCausalLM):
    """What `AutoModel` opens: the same weights, and `forward` gives the hidden states under the head."""

    def _called(self) -> Any:
        return self.model.base_model


def _takes_any_keyword(function: Callable[..., Any]) -> bool:
    return any(p.kind == p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())
