"""Topology pipeline: the decoder cut into pipeline stages; optimizer states sharded (ZeRO-1) over the ranks of a stage.

DeepSpeed's PipelineEngine gives the schedule (1F1B), the process grid and the optimizer step. What passes between
stages is decided here: every rank plans the same micro-batches, so shapes are known on both sides and only
activations travel; gradients travel only to stages that need them.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import ZERO_OPTIMIZATION, DeepSpeedEngine
from deepspeed.runtime.pipe import p2p, schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.pipe.topology import PipelineParallelGrid
from deepspeed.utils import groups, safe_set_full_fp32_param, safe_set_full_optimizer_state
from torch import nn

from lander_ds.data.batching.packing import PackedBatch
from lander_ds.distributed import collectives, process_group
from lander_ds.distributed.engines.engine import (
    Engine,
    Figures,
    MakeModel,
    MakeOptimizer,
    RankBytes,
    bytes_of,
    kept_buffers,
    optimizer_bytes,
)
from lander_ds.models.loading import Placement
from lander_ds.models.translation_model import BatchTotals, TranslationModel


class StageModule(PipelineModule):
    """DeepSpeed's container around this rank's span of the model.

    DeepSpeed counts one pipeline layer per stage; which decoder layers that is was decided before.
    """

    stage: TranslationModel

    def __init__(self, stages: int, make: Callable[[PipelineParallelGrid], TranslationModel]) -> None:
        """Set up the process grid, then let `make` build this rank's span on it."""
        self._make = make
        # DeepSpeed prints what it thinks of the layers.
        with redirect_stdout(io.StringIO()):
            super().__init__([None] * stages, num_stages=stages, partition_method="uniform")

    def _build(self) -> None:
        self.stage = self._make(self._grid)
        self.forward_funcs = [self.stage]
        for parameter in self.parameters():
            parameter.ds_pipe_replicated = False

    def forward(self, *inputs: Any) -> Any:
        """What the span computes."""
        return self.stage(*inputs)


def _by_name(name: str) -> Callable[..., None]:
    return lambda engine, **arguments: getattr(engine, name)(**arguments)


class StageEngine(PipelineEngine):
    """PipelineEngine whose stages may train nothing, pass no gradients down, and differ in their parameter groups."""

    def __init__(
        self, module: StageModule, config: dict[str, Any], optimizer: torch.optim.Optimizer | None
    ) -> None:
        """Make the engine.

        Args:
            module: this rank's stage.
            config: resolved DeepSpeed configuration.
            optimizer: of this stage; None when it trains nothing.
        """
        self._trains = optimizer is not None
        grid = module.mpu()
        super().__init__(
            args=None,
            model=module,
            optimizer=optimizer,
            mpu=grid,
            config=config,
            config_class=DeepSpeedConfig(config, grid),
            dist_init_required=False,
        )
        self.part: TranslationModel = module.stage
        self._batches: Sequence[PackedBatch] = ()
        self._norm, self._scale = BatchTotals(1, 1), 1.0
        self._forwards = self._backwards = self._received = 0
        self._gradients: dict[int, list[torch.Tensor]] = {}
        self.gradient_bytes = 0
        """Bytes of the gradients that the last step held at its end."""
        self.figures = Figures(torch.zeros(0), torch.zeros(0))
        if self._trains:
            self._join_stages(self.optimizer)

    def run(
        self,
        commands: type[schedule.PipeSchedule],
        batches: Sequence[PackedBatch],
        norm: BatchTotals,
        scale: float = 1.0,
    ) -> Figures:
        """Execute a schedule over micro-batches; returns what this rank computed of them.

        Args:
            commands: the schedule.
            batches: this data-parallel rank's micro-batches.
            norm: sizes of the global batch.
            scale: factor of the gradients.
        """
        self._batches, self._norm, self._scale = batches, norm, scale
        self._forwards = self._backwards = self._received = 0
        self.figures = Figures(
            torch.zeros(2, self.part.pairs, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        )
        self._exec_schedule(commands(len(batches), self.num_stages, self.stage_id))
        self._batches = ()
        return self.figures

    # DeepSpeed's table holds functions; this one finds methods of subclasses too.
    _INSTRUCTION_MAP: ClassVar[dict[type, Callable[..., None]]] = {
        command: _by_name(method.__name__) for command, method in PipelineEngine._INSTRUCTION_MAP.items()
    }

    def _exec_load_micro_batch(self, buffer_id: int) -> None:
        """Nothing: every stage has planned the micro-batches itself."""

    def _exec_recv_activations(self, buffer_id: int) -> None:
        tensors = self.part.carried(self._batches[self._received])
        self._received += 1
        for tensor in tensors:
            p2p.recv(tensor, self.prev_stage)
            tensor.requires_grad_(torch.is_grad_enabled() and self.part.crosses(self.part.span.start))
        self.pipe_buffers["inputs"][buffer_id] = tuple(tensors)

    def _exec_forward_pass(self, buffer_id: int) -> None:
        batch = self._batches[self._forwards]
        self._forwards += 1
        inputs = () if self.is_first_stage() else self.pipe_buffers["inputs"][buffer_id]
        # Without an optimizer DeepSpeed's forward refuses every backward pass.
        forward = super(PipelineEngine, self).forward if self._trains else self.module
        outputs = forward(batch, self._norm, *inputs)
        if self.is_last_stage():
            loss, per_pair, budget = outputs
            self.figures.per_pair.add_(per_pair.cpu())
            self.figures.budget.add_(budget.cpu())
            outputs = (loss,)
        self.pipe_buffers["outputs"][buffer_id] = outputs

    def _exec_send_activations(self, buffer_id: int) -> None:
        for tensor in self.pipe_buffers["outputs"][buffer_id]:
            p2p.send(tensor.detach().contiguous(), self.next_stage)

    def _exec_recv_grads(self, buffer_id: int) -> None:
        if self.part.crosses(self.part.span.stop):
            outputs = self.pipe_buffers["outputs"][buffer_id]
            self._gradients[buffer_id] = [torch.empty_like(tensor) for tensor in outputs]
            for gradient in self._gradients[buffer_id]:
                p2p.recv(gradient, self.next_stage)

    def _exec_backward_pass(self, buffer_id: int) -> None:
        outputs = self.pipe_buffers["outputs"][buffer_id]
        self.pipe_buffers["outputs"][buffer_id] = None
        self._backwards += 1
        if not self.part.has_backward:
            return
        gradients = self._gradients.pop(buffer_id, None) or [outputs[0].new_tensor(self._scale)]
        self._differentiate(outputs, gradients)

    def _exec_send_grads(self, buffer_id: int) -> None:
        if self.part.crosses(self.part.span.start):
            for tensor in self.pipe_buffers["inputs"][buffer_id]:
                p2p.send(tensor.grad.contiguous(), self.prev_stage)
        self.pipe_buffers["inputs"][buffer_id] = None

    def _exec_reduce_tied_grads(self) -> None:
        """Nothing: tensors that two stages hold are frozen."""

    def _exec_reduce_grads(self) -> None:
        if self._trains:
            self.gradient_bytes = sum(_gradient_bytes(p) for p in self.part.parameters())
            super()._exec_reduce_grads()

    def _exec_optimizer_step(self, lr_kwargs: Any = None) -> None:
        if self._trains:
            super()._exec_optimizer_step(lr_kwargs)
            return
        norm = self._norm_over_stages(torch.zeros(()))
        self._global_grad_norm = norm if norm >= 0 else math.inf
        self.global_steps += 1

    def _differentiate(self, outputs: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> None:
        """One backward pass; afterwards DeepSpeed takes the gradients of the parameters."""
        if not self._trains:
            torch.autograd.backward(outputs, gradients)
            return
        # What DeepSpeedEngine.backward does around a loss, around the gradients of any outputs.
        self._running_engine_backward = True
        try:
            torch.autograd.backward(outputs, gradients)
            self._backward_epilogue()
        finally:
            self._running_engine_backward = False

    def _backward_prologue_per_tensor(self, grad: Any) -> Any:
        """DeepSpeed would divide by the number of micro-batches; the loss is normalised already."""
        return grad

    def _do_optimizer_sanity_check(self, basic_optimizer: Any) -> Any:
        """ZeRO-1 for every type: the optimizer that DeepSpeed takes for bfloat16 holds whole float32 gradients twice
        and computes their norm in a way of its own."""
        return ZERO_OPTIMIZATION

    # The gradient norm: DeepSpeed adds it up over stages once per parameter group, but stages differ in their groups.

    def _join_stages(self, optimizer: Any) -> None:
        """Let DeepSpeed's optimizer see one stage, and add up the norm over stages once."""
        optimizer.model_parallel_group, optimizer.model_parallel_rank = None, 0
        of_stage = optimizer.scaled_global_norm
        optimizer.scaled_global_norm = lambda norm_type=2: self._norm_over_stages(of_stage(norm_type))
        # All stages skip the step when the norm over stages is invalid; none may decide that alone.
        optimizer.check_grad_overflow = True
        optimizer.check_overflow = lambda **_: None

    def _norm_over_stages(self, norm: torch.Tensor) -> torch.Tensor:
        """The norm of all stages' gradients from each stage's; negative (DeepSpeed's sign for invalid) when any is."""
        value = float(norm)
        summed = torch.tensor(
            [value**2, float(not value >= 0.0)], dtype=torch.float64, device=process_group.device()
        )
        dist.all_reduce(summed, group=self.grid.get_pipe_parallel_group())
        return norm.new_tensor(-1.0 if summed[1] > 0 else math.sqrt(summed[0]))


class Pipeline(Engine):
    """Pipeline stages with ZeRO-1."""

    _engine: StageEngine

    def __init__(
        self, config: dict[str, Any], stages: int, make_model: MakeModel, make_optimizer: MakeOptimizer
    ) -> None:
        """Build this rank's stage and make the engine.

        Args:
            config: resolved DeepSpeed configuration.
            stages: pipeline stages; ranks are a multiple.
            make_model, make_optimizer: called in this order.
        """
        module = StageModule(stages, lambda grid: make_model(self._place(config, grid)))
        self.model = module.stage
        optimizer = make_optimizer()
        with kept_buffers(module):
            self._engine = self._make_engine(module, config, optimizer)
        self._trains = optimizer is not None
        self.monitor = self._engine.monitor
        if self._trains:
            self._allocate()

    def _place(self, config: dict[str, Any], grid: PipelineParallelGrid) -> Placement:
        """Where a unit goes once it is read."""

        def place(unit: nn.Module) -> None:
            unit.to(process_group.device())

        return place

    def _make_engine(
        self, module: StageModule, config: dict[str, Any], optimizer: torch.optim.Optimizer | None
    ) -> StageEngine:
        # ZeRO-1 has nothing to do, and refuses to start, where nothing is trained.
        stage = 0 if optimizer is None else 1
        config = {**config, "zero_optimization": {**config["zero_optimization"], "stage": stage}}
        return StageEngine(module, config, optimizer)

    def _allocate(self) -> None:
        zero = self._engine.optimizer
        if hasattr(zero.optimizer, "allocate"):
            zero.optimizer.allocate(zero.single_partition_of_fp32_groups)
            # DeepSpeed would tell the parameters where their moments lie after the first step.
            zero._lazy_init_hp_params_optimizer_state()

    def _masters(self) -> Iterator[tuple[str, torch.Tensor]]:
        zero = self._engine.optimizer
        names = [group["name"] for group in zero.optimizer.param_groups]
        return zip(names, zero.single_partition_of_fp32_groups, strict=True)

    def _set_state(self, parameter: nn.Parameter, value: torch.Tensor, moment: str | None) -> None:
        if moment is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, moment)

    def train_step(self, batches: Sequence[PackedBatch], norm: BatchTotals) -> Figures:
        """One optimizer step: every micro-batch forward and backward through all stages (1F1B)."""
        self._engine.module.train()
        # DeepSpeed averages gradients over data-parallel ranks; the loss is normalised over all of them already.
        return self._engine.run(schedule.TrainSchedule, batches, norm, self._engine.dp_world_size)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[PackedBatch], norm: BatchTotals) -> Figures:
        """Forward passes alone."""
        self._engine.module.eval()
        return self._engine.run(schedule.InferenceSchedule, batches, norm)

    def differentiate(self, batches: Sequence[PackedBatch], norm: BatchTotals) -> None:
        """Forward and backward passes without optimizer."""
        self._engine.module.eval()
        self._engine.run(schedule.TrainSchedule, batches, norm)

    def rank_bytes(self) -> RankBytes:
        """The stage's weights and gradients; this rank's float32 masters and moments."""
        weights = bytes_of(self.model.parameters())
        if not self._trains:
            return RankBytes(weights, 0, 0)
        zero = self._engine.optimizer
        masters = zero.single_partition_of_fp32_groups
        return RankBytes(weights, self._engine.gradient_bytes, optimizer_bytes(zero.optimizer, masters))

    def destroy(self) -> None:
        """Let go of DeepSpeed's state, its process-wide grid and the process groups of that included.

        Each group has connections and threads of its own, which DeepSpeed would keep until the process ends.
        """
        grid, module = self._engine.grid, self._engine.module
        DeepSpeedEngine.destroy(self._engine)
        groups.mpu = None
        # None of them may be in use anywhere any more.
        collectives.barrier()
        made = (grid.ds_model_proc_group, grid.dp_proc_group, grid.pp_proc_group, grid.slice_proc_group)
        for group in dict.fromkeys((*made, module.world_group)):
            dist.destroy_process_group(group)


def _gradient_bytes(parameter: nn.Parameter) -> int:
    return bytes_of([parameter.grad, getattr(parameter, "grad_accum", None)])
