"""Cross-entropy at the target positions alone, in chunks, so that no [tokens, vocabulary] tensor is ever whole.

With a frozen head (the normal case here) the gradient of the hidden states is computed during the forward pass: the
head's weight is needed once per micro-batch instead of twice, and one of three products with it disappears. With a
trained head (full fine-tuning) DeepSpeed's linear cross-entropy does the work.

Shapes: N target tokens, w head width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.sequence.linear_cross_entropy import vocab_parallel_linear_cross_entropy
from torch import nn
from torch.nn import functional

from lander_ds.common.sizes import rounded_up

CHUNK_ELEMENTS = 1 << 27
"""Logits that exist at one time, in the model's type: 256 MiB in bfloat16."""
CPU_VOCABULARY_BLOCK = 4096
"""Columns of one product on CPU, where many narrow products are about 1.5 times as fast as a wide one."""
SOFTMAX_ELEMENTS = 1 << 21
"""Logits that are turned into float32 at one time on a CPU: they stay in its cache."""
DEVICE_SOFTMAX_ELEMENTS = 1 << 24
"""The same on other devices: enough to keep one busy, and few kernels for a large vocabulary; 64 MiB each of three."""


class _FrozenHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        softcap: float | None,
    ) -> torch.Tensor:
        rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            count = len(hidden[part])
            logits = _logits(hidden[part], weight, bias)
            losses[part] = _losses_and_slopes(logits[:count], targets[part], softcap)
            if grad is not None:
                grad[part] = _through_head(logits, weight)[:count]
        ctx.save_for_backward(grad)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0].unsqueeze(-1).to(grad.dtype), None, None, None, None


def _blocks(weight: torch.Tensor) -> list[slice]:
    """Parts of the vocabulary that are multiplied at once."""
    vocabulary = weight.shape[0]
    width = CPU_VOCABULARY_BLOCK if weight.device.type == "cpu" else vocabulary
    return [slice(start, min(start + width, vocabulary)) for start in range(0, vocabulary, width)]


def _logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """[rounded_up(rows), V] in the model's type; those beyond the rows are of zeros."""
    hidden = functional.pad(hidden, (0, 0, 0, rounded_up(len(hidden)) - len(hidden)))
    logits = hidden.new_empty(len(hidden), weight.shape[0])
    for block in _blocks(weight):
        logits[:, block] = functional.linear(hidden, weight[block], None if bias is None else bias[block])
    return logits


def _losses_and_slopes(logits: torch.Tensor, targets: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Losses [rows] in float32; overwrites `logits` with d loss / d logits = softmax - onehot."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    at_once = SOFTMAX_ELEMENTS if logits.device.type == "cpu" else DEVICE_SOFTMAX_ELEMENTS
    rows = max(1, at_once // logits.shape[1])
    for start in range(0, len(logits), rows):
        part = slice(start, start + rows)
        index = targets[part].unsqueeze(-1)
        values, bent = logits[part], None
        if softcap is not None:
            bent = torch.tanh(values.float() / softcap)
            values = bent * softcap
        log_probabilities = functional.log_softmax(values, dim=-1, dtype=torch.float32)
        losses[part] = -log_probabilities.gather(-1, index).squeeze(-1)
        slopes = log_probabilities.exp_()
        slopes.scatter_add_(-1, index, slopes.new_full(index.shape, -1.0))
        if bent is not None:
            # d softcap * tanh(z / softcap) / dz.
            slopes *= 1.0 - bent.square_()
        logits[part] = slopes
    return losses


def _through_head(slopes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """d loss / d hidden [rows, w] in float32."""
    grad = torch.zeros(len(slopes), weight.shape[1], dtype=torch.float32, device=slopes.device)
    for block in _blocks(weight):
        grad += slopes[:, block] @ weight[block]
    return grad


def _frozen_head_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    softcap: float | None,
) -> torch.Tensor:
    return _FrozenHeadLoss.apply(hidden, weight, bias, targets, softcap)  # type: ignore[no-untyped-call, no-any-return]


class LossHead(nn.Module):
    """The language-model head and the cross-entropy behind it. Shares the HF head's parameters."""

    def __init__(self, head: nn.Module, softcap: float | None) -> None:
        """Take over a head.

        Args:
            head: linear layer w -> V, perhaps with bias.
            softcap: logits z become softcap * tanh(z / softcap); None: unchanged.
        """
        super().__init__()
        assert isinstance(head.weight, nn.Parameter)
        self.weight = head.weight
        self.bias: nn.Parameter | None
        self.register_parameter("bias", getattr(head, "bias", None))
        self.softcap = softcap

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Loss of each target token in nats, float32 [N], from hidden states [N, w] and target ids [N]."""
        if not self.weight.requires_grad:
            return _frozen_head_loss(hidden, self.weight, self.bias, targets, self.softcap)
        if self.softcap is None:
            return vocab_parallel_linear_cross_entropy(  # type: ignore[no-any-return]
                hidden, self.weight, targets, bias=self.bias, reduction="none"
            )
        logits = functional.linear(hidden, self.weight, self.bias).float()
        logits = self.softcap * torch.tanh(logits / self.softcap)
        return functional.cross_entropy(logits, targets, reduction="none")
