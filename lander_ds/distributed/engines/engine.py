"""What the stages see of a topology: micro-batches in, figures out. One implementation per topology beside this file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import nn

from lander_ds.data.batching.packing import PackedBatch
from lander_ds.distributed.engines.deepspeed_internals import check_deepspeed, local_shard
from lander_ds.distributed.engines.digest import digest
from lander_ds.distributed.engines.figures import Figures, RankBytes
from lander_ds.models.loading import Placement
from lander_ds.models.translation_model import BatchTotals, GateStatistics, TranslationModel

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state per parameter."""
AVERAGE = "average"
"""State per parameter of a training that averages."""


class Engine(ABC):
    """A model spread over the ranks. All methods but the properties are collective.

    First there is the engine alone, which says where a unit of the model goes once it is read; then it is given what
    it runs:

        engine = open_engine(recipe, config)
        fill(model, family, weights, engine.placement, span=span, reads=engine.reads_weights)
        engine.attach(TranslationModel(model, family, pairs, span=span), optimizer)
    """

    model: TranslationModel
    """This rank's span."""
    _engine: Any
    """DeepSpeed's engine."""
    _trains: bool
    """Whether there is an optimizer on this rank."""

    def __init__(self, config: dict[str, Any]) -> None:
        """Prepare.

        Args:
            config: resolved DeepSpeed configuration.

        Raises:
            ConfigError: the installed DeepSpeed does not fit.
        """
        check_deepspeed()
        self._config = config

    @property
    @abstractmethod
    def placement(self) -> Placement:
        """What shards or moves a unit of the model once it is read."""

    @property
    @abstractmethod
    def reads_weights(self) -> bool:
        """Whether this rank reads weights from disk; otherwise `placement` gets them from another rank."""

    def attach(self, model: TranslationModel, optimizer: torch.optim.Optimizer | None) -> None:
        """Take over this rank's span.

        Args:
            model: every unit of it has been through `placement`.
            optimizer: of what it trains; None when that is nothing.
        """
        self.model, self._trains = model, optimizer is not None
        self._engine = self._wrap(model, optimizer)
        if self._trains:
            self._allocate()

    @abstractmethod
    def _wrap(self, model: TranslationModel, optimizer: torch.optim.Optimizer | None) -> Any:
        """DeepSpeed's engine around this rank's span."""

    @abstractmethod
    def _allocate(self) -> None:
        """Make the optimizer's state now, so that its size is known before the first step."""

    @property
    def monitor(self) -> Any:
        """DeepSpeed's monitor (TensorBoard)."""
        return self._engine.monitor

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups on this rank; empty when it trains nothing."""
        optimizer = self._optimizer
        return [] if optimizer is None else optimizer.param_groups

    @property
    def grad_norm(self) -> float:
        """Norm of the whole model's gradient in the last step, before clipping."""
        norm = self._engine.get_global_grad_norm()
        return 0.0 if norm is None else float(norm)

    @abstractmethod
    def train_step(
        self,
        batches: Sequence[PackedBatch],
        totals: BatchTotals,
        alpha: float = 0.0,
        gates: GateStatistics | None = None,
    ) -> Figures:
        """One optimizer step over this data-parallel rank's micro-batches.

        Args:
            batches: the micro-batches.
            totals: sizes of the global batch.
            alpha: weight of the gate noise.
            gates: counts the gate values of this rank's layers.
        """

    def average(self, share: float) -> None:
        """Move the averages of the trained weights by a share of the distance to what the weights are now."""
        optimizer = self._optimizer
        if optimizer is not None:
            for _, part in self._masters():
                optimizer.state[part][AVERAGE].lerp_(part.detach(), share)

    @abstractmethod
    def evaluate(self, batches: Sequence[PackedBatch], totals: BatchTotals) -> Figures:
        """Forward passes alone, in evaluation mode."""

    @abstractmethod
    def differentiate(self, batches: Sequence[PackedBatch], totals: BatchTotals) -> None:
        """Forward and backward passes of an engine without optimizer, in evaluation mode (detection)."""

    @abstractmethod
    def rank_bytes(self) -> RankBytes:
        """What this rank holds: weights (its shard of them); gradients; float32 masters and moments."""

    def destroy(self) -> None:
        """Let go of DeepSpeed's state."""
        self._engine.destroy()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters of this rank's span under their names in the whole model, tied ones once."""
        own = {id(parameter) for parameter in self.model.parameters()}
        for name, parameter in self.model.model.named_parameters():
            if id(parameter) in own:
                yield name, parameter

    @abstractmethod
    def _masters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Group name and this rank's flat float32 masters, in all parts that the optimizer holds them in."""

    @property
    def _optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer inside DeepSpeed's; None when this rank trains nothing."""
        return self._engine.optimizer.optimizer if self._trains else None

    @property
    def _averages(self) -> bool:
        return bool(getattr(self._optimizer, "averages", False))

    @abstractmethod
    def _set_state(self, parameter: nn.Parameter, value: torch.Tensor, moment: str | None) -> None:
        """Put a whole float32 tensor into this rank's part of the masters (`moment` None) or of a moment."""

    def group_steps(self) -> dict[str, int]:
        """Optimizer steps that each group of this rank has taken (groups are skipped where no pair owns them)."""
        optimizer = self._optimizer
        if optimizer is None:
            return {}
        states = ((name, optimizer.state[part]) for name, part in self._masters())
        return {name: int(state["step"]) for name, state in states if "step" in state}

    def state_tensors(self, mine: Callable[[int], bool]) -> Iterator[tuple[str, str | None, torch.Tensor]]:
        """Whole float32 masters, moments and averages of the trained parameters of this span: name, kind of state or None,
        tensor in host memory (collective among the ranks that share the span).

        Args:
            mine: number of a parameter -> whether this rank wants it; the others are only taken part in.
        """
        optimizer = self._optimizer
        moments = MOMENTS if optimizer is not None and "betas" in optimizer.defaults else ()
        if self._averages:
            moments = (*moments, AVERAGE)
        trained = [
            (name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad
        ]
        for number, (name, parameter) in enumerate(trained):
            for moment in (None, *moments):
                if moment is None:
                    whole = safe_get_full_fp32_param(parameter)
                else:
                    whole = safe_get_full_optimizer_state(parameter, moment)
                if mine(number):
                    yield name, moment, whole.to("cpu", copy=True)

    def restore(
        self,
        masters: Mapping[str, torch.Tensor],
        moments: Mapping[str, torch.Tensor],
        steps: Mapping[str, int],
        averages: Mapping[str, torch.Tensor],
    ) -> None:
        """Take over the optimizer's state; the weights themselves were filled with the masters already.

        Args:
            masters: name -> whole float32 tensor.
            moments: `exp_avg/NAME`, `exp_avg_sq/NAME` -> the same; empty for optimizers without.
            steps: group -> optimizer steps it has taken.
            averages: name -> average of its values; empty before there is one.
        """
        optimizer = self._optimizer
        if optimizer is None:
            return
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                self._set_state(parameter, masters[name], None)
                for moment in MOMENTS if moments else ():
                    self._set_state(parameter, moments[f"{moment}/{name}"], moment)
                if averages and self._averages:
                    self._set_state(parameter, averages[name], AVERAGE)
        for group, part in self._masters():
            state = optimizer.state[part]
            if "step" in state:
                like = state["step"]
                state["step"] = like.fill_(steps[group]) if isinstance(like, torch.Tensor) else steps[group]

    def frozen_digest(self) -> list[int]:
        """Digests of this rank's share of every frozen parameter. Equal digests: bitwise equal shares."""
        named = sorted(self.named_parameters(), key=lambda item: item[0])
        digests = [digest(local_shard(parameter)) for _, parameter in named if not parameter.requires_grad]
        return torch.stack(digests).tolist() if digests else []


@contextmanager
def preserved_buffers(module: nn.Module) -> Iterator[None]:
    """Within this context buffers may change their type; afterwards they have the old one again.

    DeepSpeed would turn rotary frequencies into bfloat16, which moves far positions.
    """
    kept = [
        (part, name, buffer.clone())
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None
    ]
    yield
    for part, name, buffer in kept:
        current = part._buffers[name]
        assert current is not None
        part._buffers[name] = buffer.to(current.device)
