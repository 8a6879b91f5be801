"""Attention inside the examples of a packed row: no padding, none across examples, sliding windows right.

Registered with transformers as the attention implementation `lander_packed`; `segment_lengths` reaches it
through the decoder layers' keyword arguments. Every example gets its own scaled-dot-product call, so cost
grows with the sum of squared example lengths and not with the square of the row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface

IMPLEMENTATION = "lander_packed"
CPU_EXPLICIT_LENGTH = 512
"""Examples up to this many tokens are attended to by plain matrix products on CPU: forward and backward together take
half as long as torch's fused kernel there."""


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    segment_lengths: tuple[int, ...],
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each segment.

    Args:
        module: the attention module (unused; part of the transformers interface).
        query: [1, heads, T, head width]. key, value: [1, key heads, T, head width], key heads dividing heads.
        attention_mask: must be None, segments say everything.
        scaling: factor of the scores; default 1 / sqrt(head width).
        dropout: attention dropout.
        segment_lengths: lengths of the examples, summing to T.
        sliding_window: a token sees itself and this many minus one before it; None sees all before.
        softcap: scores s become softcap * tanh(s / softcap) (Gemma 2).

    Returns: ([1, T, heads, head width], None).
    """
    lengths = list(segment_lengths)
    parts = zip(*(torch.split(tensor, lengths, 2) for tensor in (query, key, value)), strict=True)
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    for q, k, v in parts:
        mask = _window_mask(q.shape[2], sliding_window, q.device)
        if softcap is not None or (q.device.type == "cpu" and q.shape[2] <= CPU_EXPLICIT_LENGTH):
            outputs.append(_explicit(q, k, v, mask, scaling, softcap, dropout))
            continue
        outputs.append(
            functional.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=grouped,
            )
        )
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


def _window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """[length, length] bool, True where a token is seen; None where plain causal attention is the same."""
    if window is None or length <= window:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None, :]
    return (distance >= 0) & (distance < window)


def _explicit(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    dropout: float,
) -> torch.Tensor:
    """Attention as matrix products, [1, heads, L, head width]; heads that share a key head are one product."""
    _, heads, length, width = q.shape
    groups = k.shape[1]
    folded = q.reshape(groups, heads // groups * length, width)
    scores = (folded @ k[0].transpose(1, 2)).view(1, heads, length, length)
    scores = scores * (scaling if scaling is not None else width**-0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = mask if mask is not None else torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    weights = functional.dropout(weights, dropout).view(groups, heads // groups * length, length)
    return (weights @ v[0]).view(1, heads, length, v.shape[-1])


AttentionInterface.register(IMPLEMENTATION, packed_attention)
