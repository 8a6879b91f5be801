"""SHiRA (Bhardwaj et al. 2024): sparse, high-rank updates in place. A baseline: its entries are drawn at random and belong
to no language.

PEFT's layer draws its mask on the device of the weight, which is meta here, keeps it outside of buffers and reads the
weight of a submodule that ZeRO-3 has not gathered. So this one owns the weight. It also holds the trained entries
themselves rather than their difference from the base, so that an export rounds once and computes what was trained; with
AdamW both take the same steps, apart from weight decay, which pulls entries towards 0 and not towards the base.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from lander_ds.common.errors import ConfigError
from lander_ds.models.routed_ffn import replace
from lander_ds.models.surgery import Slice, mark

ENTRIES = "shira_entries"
"""Name of the trained parameter of every adapted projection."""


class _SparseLinear(torch.autograd.Function):
    """x W^T, where some entries of W are a parameter of their own."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, entries: torch.Tensor, indices: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, entries, indices)
        return x @ _merged(weight, entries, indices).t()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        x, weight, entries, indices = ctx.saved_tensors
        grad_x = grad_entries = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ _merged(weight, entries, indices)
        if ctx.needs_input_grad[2]:
            whole = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
            grad_entries = whole.view(-1).index_select(0, indices)
        return grad_x, None, grad_entries, None


def _merged(weight: torch.Tensor, entries: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """W [out, in] with the entries in it; made anew each time, so that no second copy of the weights stays."""
    merged = weight.detach().clone()
    merged.view(-1).index_copy_(0, indices, entries.detach())
    return merged


class ShiraLinear(nn.Module):
    """A linear projection of which some entries are trained."""

    indices: torch.Tensor
    bias: nn.Parameter | None

    def __init__(self, base: nn.Linear, indices: torch.Tensor) -> None:
        """Take a projection over.

        Args:
            base: the projection; may be on meta. Its weight keeps the base's values.
            indices: [n] int64, ascending: the trained entries of its flattened weight [out, in].
        """
        super().__init__()
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        self.register_buffer("indices", indices, persistent=False)
        entries = torch.empty(len(indices), dtype=base.weight.dtype, device="meta")
        self.register_parameter(ENTRIES, nn.Parameter(entries))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        entries = self.get_parameter(ENTRIES)
        y: torch.Tensor = _SparseLinear.apply(x, self.weight, entries, self.indices)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias

    def folded(self) -> nn.Linear:
        """A plain projection that computes the same."""
        out_features, in_features = self.weight.shape
        plain = nn.Linear(in_features, out_features, bias=self.bias is not None, device="meta")
        plain.weight = nn.Parameter(_merged(self.weight, self.get_parameter(ENTRIES), self.indices))
        plain.register_parameter("bias", self.bias)
        return plain


def install_shira(model: PreTrainedModel, r: int, seed: int) -> None:
    """Train some entries of every linear projection but the head and experts (as LoRA does): as many as LoRA of rank r would
    train, r (in + out).

    Args:
        model: the HF model, on meta. The entries get their values with the base's, by `fill`.
        r: sets the number of entries.
        seed: the entries depend on it and on the projection's name alone.

    Raises:
        ConfigError: a projection has fewer entries than that.
    """
    head = model.get_output_embeddings()
    linear = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    for name, base in linear:
        count = r * (base.in_features + base.out_features)
        if count > base.weight.numel():
            largest = base.weight.numel() // (base.in_features + base.out_features)
            raise ConfigError(
                f"train.shira.r: {r} would train {count} entries of {name}, which has {base.weight.numel()}; "
                f"at most {largest} fits it"
            )
        indices = drawn_entries(base.weight.numel(), count, seed, name)
        adapted = ShiraLinear(base, indices)
        mark(adapted.get_parameter(ENTRIES), Slice(f"{name}.weight", None, indices, base.weight.shape))
        replace(model, name, adapted)


def fold_shira(model: PreTrainedModel) -> None:
    """Put plain projections in place of adapted ones: inference costs no more than the base's."""
    for name, module in list(model.named_modules()):
        if isinstance(module, ShiraLinear):
            replace(model, name, module.folded())


def drawn_entries(elements: int, count: int, seed: int, name: str) -> torch.Tensor:
    """`count` different numbers below `elements`, ascending: one at random in each of `count` stretches of equal length
    (I: SHiRA's random mask, stratified, which needs no list of all elements).

    A checkpoint holds the entries and not where they stand, so this must stay the same for ever: NumPy promises that
    of a bit generator's raw numbers.

    Returns: [count] int64.
    """
    edges = np.arange(count + 1, dtype=np.int64) * elements // count
    raw = np.random.PCG64([seed, zlib.crc32(name.encode())]).random_raw(count)
    within = (raw % np.diff(edges).astype(np.uint64)).astype(np.int64)
    return torch.from_numpy(edges[:-1] + within)
