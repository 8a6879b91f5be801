"""Cross-entropy at the target positions alone, in chunks, so that no [tokens, vocabulary] tensor is ever whole.

With a frozen head (the normal case here) the gradient of the hidden states is computed during the forward pass: the
head's weight is needed once per micro-batch instead of twice, and one of three products with it disappears. With a
trained head (full fine-tuning) DeepSpeed's linear cross-entropy does the work.

Shapes: N target tokens, w head width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

CHUNK_ELEMENTS = 1 << 25
"""Logits that exist at one time: 128 MiB in float32."""


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
        wanted = ctx.needs_input_grad[0]
        grad = torch.empty_like(hidden) if wanted else None
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = functional.linear(hidden[part], weight, bias)
            bent = None
            if softcap is not None:
                bent = torch.tanh(logits.float() / softcap)
                logits = bent * softcap
            log_probabilities = functional.log_softmax(logits, dim=-1, dtype=torch.float32)
            index = targets[part].unsqueeze(-1)
            losses[part] = -log_probabilities.gather(-1, index).squeeze(-1)
            if grad is None:
                continue
            # d loss / d logits = softmax - onehot; the softcap's derivative is 1 - tanh^2.
            slope = log_probabilities.exp_()
            slope.scatter_add_(-1, index, slope.new_full(index.shape, -1.0))
            if bent is not None:
                slope *= 1.0 - bent.square_()
            grad[part] = slope.to(weight.dtype) @ weight
        ctx.save_for_backward(grad)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0].unsqueeze(-1).to(grad.dtype), None, None, None, None


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
            from deepspeed.sequence.linear_cross_entropy import vocab_parallel_linear_cross_entropy

            return vocab_parallel_linear_cross_entropy(  # type: ignore[no-any-return]
                hidden, self.weight, targets, bias=self.bias, reduction="none"
            )
        logits = functional.linear(hidden, self.weight, self.bias).float()
        logits = self.softcap * torch.tanh(logits / self.softcap)
        return functional.cross_entropy(logits, targets, reduction="none")
