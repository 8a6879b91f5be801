"""BLOOM's attention inside the examples of a packed row. Its layers know no attention interface: they compute scores over
everything that they are given, which would be the square of the row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.models.bloom.modeling_bloom import BloomAttention

from lander_ds.models.attention import Segments, packed_attention


class PackedBloomAttention(BloomAttention):
    """The same module, which takes the examples of the row in place of a mask, and then attends inside them."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor,
        alibi: torch.Tensor,
        attention_mask: Any,
        *rest: Any,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """With `Segments` as mask: hidden states and residual [1, T, d], alibi [heads] -> [1, T, d], no weights. With
        anything else as in transformers, which generates so.
        """
        if not isinstance(attention_mask, Segments):
            return super().forward(hidden_states, residual, alibi, attention_mask, *rest, **options)  # type: ignore[no-any-return]
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        output, _ = packed_attention(
            self,
            query,
            key,
            value,
            None,
            scaling=self.inv_norm_factor,
            dropout=self.attention_dropout.p if self.training else 0.0,
            segments=attention_mask,
            slopes=alibi,
        )
        output = self.dense(output.flatten(2))
        return residual + nn.functional.dropout(output, self.hidden_dropout, self.training), None


def attend_in_examples(decoder: nn.Module) -> None:
    """Have the layers of a decoder do so."""
    assert isinstance(decoder.h, nn.ModuleList)
    for layer in decoder.h:
        if type(layer.self_attention) is BloomAttention:
            layer.self_attention.__class__ = PackedBloomAttention
