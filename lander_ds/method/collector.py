"""Collecting the statistics of FFN neurons from ordinary forward and backward passes of a frozen model.

Shapes: T tokens of a micro-batch, K of them not padding, M pairs, L layers, f neurons per layer (of a mixture: of all
experts).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lander_ds.common.errors import DataError, ModelError
from lander_ds.method.awareness import STATISTICS, Awareness, AwarenessMetadata

BLOCK = 2**17
"""Values of h that are looked at together on a CPU: half a megabyte in float32."""


class Dispatch(Protocol):
    """Which rows of h went to which expert; see `models.experts`."""

    @property
    def choices(self) -> int:
        """Rows per token."""

    @property
    def tokens(self) -> torch.Tensor:
        """int64: the token of each row."""

    def rows(self) -> Iterator[tuple[int, slice]]:
        """Experts, and their rows."""


@dataclass(frozen=True)
class _Ownership:
    """Which pair each token of the current micro-batch belongs to."""

    tokens: int
    """T."""
    kept: torch.Tensor | None
    """[K] int64 positions of the tokens that are not padding; None when no token is."""
    one_hot: torch.Tensor
    """[M, K] float32: 1 where the token belongs to the pair."""

    def positions(self, tokens: torch.Tensor) -> torch.Tensor:
        """Where tokens, by their positions, stand among those that are not padding, or -1."""
        if self.kept is None:
            return tokens
        position = torch.full((self.tokens,), -1, device=tokens.device)
        position[self.kept] = torch.arange(len(self.kept), device=tokens.device)
        return position[tokens]


class StatisticsCollector:
    """Sums of h, |h|, [h > 0], |g h| and (g h)^2 per pair, layer and neuron.

    h is the input of a layer's down projection (the neurons' inner activations), g its gradient, which
    reaches the collector through a tensor hook on h. No weight needs a gradient; only h must depend on
    something that does, e.g. the embeddings' output. Use it as a context manager: the hooks go when the block
    ends.

        with StatisticsCollector(modules, pairs=len(pairs), device=device) as collector:
            for batch in batches:
                collector.set_pairs(batch.pair_ids)
                summed_loss(batch).backward()
            collector.reduce(sum_over_ranks)
            awareness = collector.finish(pairs, metadata)

    L must be summed, not averaged, over target tokens; then the sums do not depend on how the data is cut.
    Within a block of tokens sums are float32, across blocks, micro-batches and ranks float64.
    """

    def __init__(
        self, down_projections: Mapping[int, nn.Module], layers: int, pairs: int, device: torch.device
    ) -> None:
        """Prepare sums for `pairs` pairs on `device`; hooks are set on entering the context.

        Args:
            down_projections: decoder layer -> its down projection, of the layers that this rank computes; linear
                modules whose `in_features` is f. Under ZeRO-3 their weights may be partitioned.
            layers: L, of the whole model. The ranks that hold layer 0 count the tokens.
            pairs: M.
            device: where the sums are kept: [5, M, L, f] float64.

        Raises:
            ModelError: the layers differ in f.
        """
        widths = sorted({int(module.in_features) for module in down_projections.values()})  # type: ignore[arg-type]
        if len(widths) != 1:
            raise ModelError(
                f"the FFN layers have {widths} neurons but awareness needs the same number in each: "
                f"use another base model"
            )
        self._modules = dict(down_projections)
        self._tokens = torch.zeros(pairs, dtype=torch.float64, device=device)
        shape = (len(STATISTICS), pairs, layers, widths[0])
        self._sums = torch.zeros(shape, dtype=torch.float64, device=device)
        self._micro_batches = 0
        self._recorded = dict.fromkeys(self._modules, 0)
        self._ownership: _Ownership | None = None
        self._handles: list[RemovableHandle] = []
        self._reduced = False

    def __enter__(self) -> StatisticsCollector:
        for layer, module in self._modules.items():
            self._handles.append(module.register_forward_pre_hook(self._capture(layer)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._ownership = None

    def set_pairs(self, pair_ids: torch.Tensor) -> None:
        """Announce the next micro-batch.

        Args:
            pair_ids: int64, one per token in the order of the tokens ([T], or [B, T] row by row); -1 is
            padding.

        Raises:
            ValueError: an id is not below the number of pairs.
        """
        ids = pair_ids.reshape(-1).to(self._sums.device)
        pairs = len(self._tokens)
        if ids.numel() and not (int(ids.min()) >= -1 and int(ids.max()) < pairs):
            raise ValueError(f"pair ids must lie between -1 (padding) and {pairs - 1}")
        kept = torch.nonzero(ids >= 0).squeeze(1)
        one_hot = torch.zeros(pairs, len(kept), device=ids.device)
        one_hot[ids[kept], torch.arange(len(kept), device=ids.device)] = 1.0
        self._ownership = _Ownership(len(ids), None if len(kept) == len(ids) else kept, one_hot)
        if 0 in self._modules:
            self._tokens += one_hot.sum(1, dtype=torch.float64)
        self._micro_batches += 1

    def _capture(self, layer: int) -> Any:
        def before_down_projection(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            h, ownership = inputs[0], self._ownership
            dispatch = inputs[1] if len(inputs) > 1 else None
            if ownership is None:
                raise RuntimeError("StatisticsCollector.set_pairs must be called before the forward pass")
            tokens = h.shape[:-1].numel() // (1 if dispatch is None else dispatch.choices)
            if tokens != ownership.tokens:
                raise RuntimeError(
                    f"layer {layer} sees {tokens} tokens but set_pairs announced {ownership.tokens}"
                )
            if not h.requires_grad:
                raise RuntimeError(
                    f"the FFN activations of layer {layer} carry no gradient: enable gradients and make the "
                    f"embeddings' output require one before the forward pass"
                )
            # Detached, because a closure over h itself would keep the graph alive; popped, so that the
            # activations are freed as the backward pass goes and not when the caller lets go of the loss.
            kept = [h.detach()]
            h.register_hook(lambda g: self._record(layer, kept.pop(), g, ownership, dispatch))

        return before_down_projection

    def _record(
        self, layer: int, h: torch.Tensor, g: torch.Tensor, ownership: _Ownership, dispatch: Dispatch | None
    ) -> None:
        h, g = (x.detach().reshape(-1, x.shape[-1]) for x in (h, g))
        if dispatch is None:
            if ownership.kept is not None:
                # Dropped, not multiplied by zero: padding may hold NaN.
                h, g = h[ownership.kept], g[ownership.kept]
            self._add(self._sums[:, :, layer], h, g, ownership.one_hot)
        else:
            # A token's neurons are those of the experts that it was sent to; of the others h is 0.
            position = ownership.positions(dispatch.tokens)
            for expert, rows in dispatch.rows():
                kept = torch.nonzero(position[rows] >= 0).squeeze(1)
                sums = self._sums[:, :, layer, expert * h.shape[1] : (expert + 1) * h.shape[1]]
                self._add(sums, h[rows][kept], g[rows][kept], ownership.one_hot[:, position[rows][kept]])
        self._recorded[layer] += 1

    @staticmethod
    def _add(sums: torch.Tensor, h: torch.Tensor, g: torch.Tensor, one_hot: torch.Tensor) -> None:
        """Add the statistics of rows h, g [K, n], whose pairs are one_hot [M, K], to sums [5, M, n]."""
        # On a CPU in blocks that stay in its cache: a third of the time. On a GPU each block would cost its own kernels.
        rows = max(1, BLOCK // h.shape[1]) if h.device.type == "cpu" else max(1, len(h))
        for begin in range(0, len(h), rows):
            block = slice(begin, begin + rows)
            own = h[block].float()
            for statistic, values in enumerate(_per_token_values(own, g[block].float() * own)):
                sums[statistic] += (one_hot[:, block] @ values).double()

    def reduce(self, all_reduce: Callable[[torch.Tensor], object]) -> None:
        """Sum over ranks. Every rank calls it once, after its last micro-batch, even if it had none.

        Args:
            all_reduce: adds up a tensor over all ranks, in place.

        Raises:
            RuntimeError: a micro-batch was announced whose backward pass did not reach every layer, or the
            sums are
                reduced already.
        """
        if self._reduced:
            raise RuntimeError("StatisticsCollector.reduce was called twice")
        for layer, recorded in self._recorded.items():
            if recorded != self._micro_batches:
                raise RuntimeError(
                    f"layer {layer} recorded {recorded} of {self._micro_batches} micro-batches: "
                    f"every set_pairs needs one forward and one backward pass through every layer"
                )
        all_reduce(self._tokens)
        all_reduce(self._sums)
        self._reduced = True

    def finish(self, pairs: Sequence[str], metadata: AwarenessMetadata) -> Awareness:
        """The awareness of what was collected (of all ranks after `reduce`).

        Args:
            pairs: M language pairs in the order of the pair ids.
            metadata: where the data and the model come from.

        Raises:
            DataError: a pair had no tokens, or no gradient at all.
            ModelError: the model computed NaN or infinity.
        """
        sums = dict(zip(STATISTICS, self._sums.cpu(), strict=True))
        tokens = self._tokens.cpu()
        for row, pair in enumerate(pairs):
            for layer in range(self._sums.shape[2]):
                if not all(torch.isfinite(values[row, layer]).all() for values in sums.values()):
                    raise ModelError(
                        f"the base model computes NaN or infinity in layer {layer} for pair {pair}: "
                        f"set model.dtype to bfloat16 or float32, or check the model's weights"
                    )
            if tokens[row] == 0:
                raise DataError(
                    f"pair {pair} has no detection data: add a corpus with split: detect, "
                    f"or set data.detect_examples"
                )
            if not sums["sum_abs_gh"][row].any():
                raise DataError(
                    f"pair {pair} has no gradient anywhere: its detection data has no target tokens, or "
                    f"gradients underflow (then set model.dtype to bfloat16 or float32)"
                )
        return Awareness(pairs=tuple(pairs), tokens=tokens, **sums, metadata=metadata)


def _per_token_values(h: torch.Tensor, gh: torch.Tensor) -> Iterator[torch.Tensor]:
    """[K, f] float32 summands in the order of STATISTICS, made one at a time to hold only one in memory."""
    yield h
    yield h.abs()
    yield (h > 0).float()
    yield gh.abs()
    yield gh.square()
