"""A routed translation model for transformers: a plain HF model whose selected FFNs are routed.

An export directory carries this file and `routed_ffn.py`; nothing else is needed:

    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    model.generate(**inputs, pair="en-de")
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel

from .routed_ffn import BankFFN, Gate, RoutedFFN, Routing, carrying, routed, take_place


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
    """The routed model. `forward` and `generate` take `pair` (e.g. "en-de") or `pair_ids`.

    The pair holds for that call and that thread alone: threads may translate different pairs at the same time.
    """

    config_class = LanderConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: LanderConfig) -> None:
        """Build the plain model and put routed FFNs into the selected layers."""
        super().__init__(config)
        # `from_pretrained` makes the type it was asked for the default while it builds; parts must follow it.
        self.model = AutoModelForCausalLM.from_config(config.base_config(), dtype=torch.get_default_dtype())
        self._no_split_modules = self.model._no_split_modules
        routing = config.routing
        layers = self.model.get_submodule(routing["layers_path"])
        for entry in routing["layers"]:
            layer = layers[entry["layer"]]
            take_place(layer, routing["ffn"], self._routed_ffn(layer, entry))
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
                BankFFN(bank["kind"], owners, torch.empty(size, d), torch.empty(d, size), gate, bias)
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
            if pair not in pairs:
                raise ValueError(f"unknown pair {pair!r}; this model knows {', '.join(pairs)}")
            pair_ids = torch.tensor(pairs.index(pair), device=self.device)
        if pair_ids is None:
            raise ValueError(f"say which language pair: pair=..., one of {', '.join(pairs)}")
        return Routing(pair_ids)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, **options: Any
    ) -> None:
        """A layer that is run again in the backward pass belongs to the pair of its forward pass."""

        def checkpointed(function: Any, *args: Any, **kwargs: Any) -> Any:
            return gradient_checkpointing_func(carrying(function), *args, **kwargs)

        super()._set_gradient_checkpointing(enable, checkpointed, **options)

    def forward(
        self, *args: Any, pair: str | None = None, pair_ids: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Forward of the plain model with the routing of `pair`.

        Args:
            args, kwargs: as of the plain model.
            pair: language pair of the whole batch.
            pair_ids: or int64 pair ids, [B] or [B, T].
        """
        with routed(self._routing(pair, pair_ids)):
            return self.model(*args, **kwargs)

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
