"""Attention inside the examples of a packed row: no padding, none across examples, sliding windows right.

Registered with transformers as the attention implementation `lander_packed`; `segments` reaches it through the decoder
layers' keyword arguments. On a CPU every example gets its own products, so cost grows with the sum of squared example
lengths and not with the square of the row. Elsewhere the number of kernels must not grow with the number of examples:
one kernel for sequences of different lengths where there is one, and otherwise (float32, softcap, ALiBi, wide heads)
one batch per class of lengths, padded to the longest of it.

Shapes: T tokens, E examples, L length of an example.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

IMPLEMENTATION = "lander_packed"
CPU_EXPLICIT_LENGTH = 512
"""Examples up to this many tokens are attended to by plain matrix products on CPU: forward and backward together take
half as long as torch's fused kernel there."""
LENGTH_STEP = 16
"""Lengths on a CPU are multiples of this: few, because the products of every other one are compiled anew."""
SHORTEST_CLASS = 16
"""Examples up to this length are one class; the next reach to twice, four times, ... as many tokens."""
VARLEN_WIDTH, VARLEN_STEP = 256, 8
"""Widest head of the kernel for sequences of different lengths, and what head widths are multiples of."""


@dataclass(frozen=True, eq=False)
class Segments:
    """The examples of a packed row, for all layers."""

    lengths: tuple[int, ...]
    """E lengths that sum to T."""
    boundaries: torch.Tensor
    """[E + 1] int32 on the device of the row: where each example begins, and T."""

    @cached_property
    def classes(self) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Examples of like lengths, padded with their last token to the longest of their class, on the device.

        Returns:
            Per class [E', L] int64, the tokens of its examples; and [T] int64, where every token stands in the classes,
            flattened and put behind one another.
        """
        members = defaultdict(list)
        starts = [0, *accumulate(self.lengths)]
        for start, length in zip(starts, self.lengths, strict=False):
            size = SHORTEST_CLASS
            while size < length:
                size *= 2
            members[size].append((start, length))
        tokens, order, offset = [], np.empty(starts[-1], dtype=np.int64), 0
        for size in sorted(members):
            longest = max(length for _, length in members[size])
            steps = np.arange(longest)
            tokens.append(np.stack([start + np.minimum(steps, n - 1) for start, n in members[size]]))
            for start, length in members[size]:
                order[start : start + length] = offset + steps[:length]
                offset += longest
        return tuple(self._on_device(index) for index in tokens), self._on_device(order)

    def _on_device(self, index: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(index).to(self.boundaries.device, non_blocking=True)


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Segments,
    sliding_window: int | None = None,
    softcap: float | None = None,
    slopes: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each segment.

    Args:
        module: the attention module (unused; part of the transformers interface).
        query: [1, heads, T, head width]. key, value: [1, key heads, T, head width], key heads dividing heads.
        attention_mask: must be None, segments say everything.
        scaling: factor of the scores; default 1 / sqrt(head width).
        dropout: attention dropout.
        segments: the examples.
        sliding_window: a token sees itself and this many minus one before it; None sees all before.
        softcap: scores s become softcap * tanh(s / softcap) (Gemma 2).
        slopes: [heads] float32; scores of the token at position p of an example grow by slope * p, in the type of the scores
            (ALiBi, as BLOOM writes it).

    Returns: ([1, T, heads, head width], None).
    """
    options = _Options(scaling, dropout, sliding_window, softcap, slopes)
    if query.device.type == "cpu":
        output = _one_by_one(query, key, value, segments, options)
    elif options.plain and has_varlen(query):
        output = _of_different_lengths(query, key, value, segments, options)
    else:
        output = _by_class(query, key, value, segments, options)
    return output, None


@dataclass(frozen=True)
class _Options:
    """See `packed_attention`."""

    scaling: float | None
    dropout: float
    window: int | None
    softcap: float | None
    slopes: torch.Tensor | None

    @property
    def plain(self) -> bool:
        """Whether it is softmax attention and nothing else."""
        return not self.bent and self.dropout == 0.0

    @property
    def bent(self) -> bool:
        """Whether scores are changed, which no kernel of torch does."""
        return self.softcap is not None or self.slopes is not None


def has_varlen(query: torch.Tensor) -> bool:
    """Whether torch has a kernel for sequences of different lengths: on CUDA, in half precision, for most head widths, from
    Ampere on (which is also what Triton needs)."""
    half, width = query.dtype in (torch.float16, torch.bfloat16), query.shape[-1]
    fits = half and width <= VARLEN_WIDTH and width % VARLEN_STEP == 0
    return fits and query.is_cuda and bool(get_accelerator().is_triton_supported())


def _one_by_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, options: _Options
) -> torch.Tensor:
    """A call per example: [1, T, heads, head width]."""
    lengths, outputs = list(segments.lengths), []
    for q, k, v in zip(*(torch.split(tensor, lengths, 2) for tensor in (query, key, value)), strict=True):
        explicit, length = options.bent or q.shape[2] <= CPU_EXPLICIT_LENGTH, q.shape[2]
        # Behind the example, so that no token of it sees what is added.
        missing = (0, 0, 0, -length % LENGTH_STEP)
        queries, keys, values = (functional.pad(tensor, missing) for tensor in (q, k, v))
        outputs.append(_batch(queries, keys, values, options, explicit)[:, :, :length])
    return torch.cat(outputs, 2).transpose(1, 2).contiguous()


def _of_different_lengths(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, options: _Options
) -> torch.Tensor:
    """One kernel: [1, T, heads, head width]."""
    longest = max(segments.lengths)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    output = varlen_attn(
        q,
        k,
        v,
        segments.boundaries,
        segments.boundaries,
        longest,
        longest,
        scale=options.scaling,
        # How many tokens are seen on the left and on the right of one; -1: all.
        window_size=(-1 if options.window is None else options.window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, torch.Tensor)
    return output.unsqueeze(0)


def _by_class(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, options: _Options
) -> torch.Tensor:
    """A batch per class of lengths: [1, T, heads, head width].

    Padding stands behind an example, so that causal attention keeps it from its tokens; what it sees itself is dropped.
    """
    classes, order = segments.classes
    outputs = []
    for tokens in classes:
        q, k, v = (
            tensor[0]
            .index_select(1, tokens.flatten())
            .view(-1, *tokens.shape, tensor.shape[-1])
            .transpose(0, 1)
            for tensor in (query, key, value)
        )
        output = _batch(q, k, v, options, options.bent)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, order).unsqueeze(0)


def _batch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: _Options, explicit: bool
) -> torch.Tensor:
    """Attention of examples [E, heads, L, head width] of one length; `explicit`: by plain products."""
    mask = _window_mask(q.shape[2], options.window, q.device)
    if explicit:
        return _explicit(q, k, v, mask, options)
    return functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=options.dropout,
        is_causal=mask is None,
        scale=options.scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """[length, length] bool, True where a token is seen; None where plain causal attention is the same."""
    if window is None or length <= window:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None, :]
    return (distance >= 0) & (distance < window)


def _explicit(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, options: _Options
) -> torch.Tensor:
    """Attention as matrix products, [E, heads, L, head width]; heads that share a key head are one product."""
    examples, heads, length, width = q.shape
    groups = k.shape[1]
    folded = q.reshape(examples, groups, heads // groups * length, width)
    scores = (folded @ k.transpose(2, 3)).view(examples, heads, length, length)
    scores = scores * (options.scaling if options.scaling is not None else width**-0.5)
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if options.slopes is not None:
        bias = options.slopes[:, None] * torch.arange(length, device=q.device)
        scores = scores + bias.to(scores.dtype)[:, None]
    seen = mask if mask is not None else torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    weights = functional.dropout(weights, options.dropout)
    weights = weights.view(examples, groups, heads // groups * length, length)
    return (weights @ v).view(examples, heads, length, v.shape[-1])


AttentionInterface.register(IMPLEMENTATION, packed_attention)
