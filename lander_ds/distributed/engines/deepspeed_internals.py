"""Every touch of what DeepSpeed does not promise: private names, overridden instructions, replaced functions.

`check_deepspeed` refuses a DeepSpeed in which any of it has moved. DeepSpeed's PipelineEngine gives the schedule (1F1B),
the process grid and the optimizer step. What passes between pipeline stages is decided here: every rank plans the same
micro-batches, so shapes are known on both sides and only activations travel; gradients travel only to pipeline stages
that need them.
"""

from __future__ import annotations

import inspect
import io
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from importlib.metadata import version
from typing import Any, ClassVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import ZERO_OPTIMIZATION, DeepSpeedEngine
from deepspeed.runtime.pipe import p2p, schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partition_parameters import Init
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups, safe_set_local_fp32_param, safe_set_local_optimizer_state
from torch import nn

from lander_ds.common.errors import ConfigError
from lander_ds.data.batching.packing import PackedBatch
from lander_ds.distributed import accelerator, collectives
from lander_ds.distributed.engines.figures import Figures, bytes_of
from lander_ds.models.translation_model import BatchTotals, TranslationModel

TESTED = ("0.19.",)
"""Starts of the DeepSpeed versions this was tested with."""

_RELIED_ON: tuple[tuple[Any, str], ...] = (
    (DeepSpeedEngine, "zero_optimization_stage"),
    (DeepSpeedEngine, "_backward_epilogue"),
    (DeepSpeedEngine, "_backward_prologue_per_tensor"),
    (DeepSpeedEngine, "_broadcast_model"),
    (DeepSpeedEngine, "_do_optimizer_sanity_check"),
    (DeepSpeedEngine, "allreduce_gradients"),
    (PipelineEngine, "_exec_schedule"),
    *((PipelineEngine, method.__name__) for method in PipelineEngine._INSTRUCTION_MAP.values()),
    (PipelineModule, "_build"),
    (DeepSpeedZeroOptimizer, "scaled_global_norm"),
    (DeepSpeedZeroOptimizer, "check_overflow"),
    (DeepSpeedZeroOptimizer, "_lazy_init_hp_params_optimizer_state"),
    (Init, "param_id"),
    (DeepSpeedZeRoOffload, "_register_deepspeed_module"),
    (coordinator, "assert_ints_same_as_other_ranks"),
    (DeepSpeedZeroOptimizer_Stage3, "_get_norm_groups"),
    (DeepSpeedZeroOptimizer_Stage3, "clear_backward_seen_flag"),
    (DeepSpeedZeroOptimizer_Stage3, "independent_gradient_partition_epilogue"),
)

_ATTRIBUTES: tuple[tuple[Any, str], ...] = (
    (DeepSpeedZeroOptimizer, "single_partition_of_fp32_groups"),
    (DeepSpeedZeroOptimizer, "check_grad_overflow"),
    (DeepSpeedZeroOptimizer, "model_parallel_group"),
    (DeepSpeedZeroOptimizer_Stage3, "fp32_partitioned_groups_flat"),
    (DeepSpeedZeroOptimizer_Stage3, "sub_group_to_group_id"),
    (DeepSpeedZeroOptimizer_Stage3, "grad_partitions_flat_buffer"),
)
"""What objects have and classes have not."""

_OWN_GROUP = "ds_zero_partition_process_group"
"""Attribute of a parameter: the group that ZeRO-3 shards it over, where it is not that of all others."""


def check_deepspeed() -> None:
    """Refuse a DeepSpeed in which what this file relies on has moved.

    Raises:
        ConfigError: names the version and what is missing.
    """
    installed = version("deepspeed")
    missing = [f"{owner.__name__}.{name}" for owner, name in _RELIED_ON if not hasattr(owner, name)]
    missing += [
        f"{owner.__name__}.{name}"
        for owner, name in _ATTRIBUTES
        if f"self.{name} = " not in inspect.getsource(sys.modules[owner.__module__])
    ]
    if "zero_optimization_stage" not in inspect.getsource(PipelineEngine.__init__):
        missing.append("the refusal of ZeRO-3 in PipelineEngine.__init__")
    if _OWN_GROUP not in inspect.getsource(Init):
        missing.append(f"{_OWN_GROUP} of a parameter")
    if missing or not installed.startswith(TESTED):
        what = f"lacks {', '.join(missing)}" if missing else "was never tested with it"
        raise ConfigError(
            f"lander reaches into DeepSpeed, and DeepSpeed {installed} {what}: install the version in requirements.txt"
        )


def local_shard(parameter: nn.Parameter) -> torch.Tensor:
    """What this rank holds of a parameter: its shard under ZeRO-3, else all of it."""
    shard: torch.Tensor = getattr(parameter, "ds_tensor", parameter)
    return shard


def set_shard(parameter: nn.Parameter, value: torch.Tensor, moment: str | None) -> None:
    """Put this rank's shard of a whole tensor into the float32 master (`moment` None) or a moment of a parameter.

    DeepSpeed's own function for whole tensors fails where the last shard is padded.
    """
    length = local_shard(parameter).numel()
    begin = length * dist.get_rank(parameter.ds_process_group)  # type: ignore[attr-defined]
    shard = torch.zeros(length, dtype=torch.float32)
    part = value.flatten()[begin : begin + length]
    shard[: len(part)] = part
    if moment is None:
        safe_set_local_fp32_param(parameter, shard)
    else:
        safe_set_local_optimizer_state(parameter, shard, moment)


@contextmanager
def frozen_within(unit: nn.Module, group: dist.ProcessGroup | None) -> Iterator[None]:
    """Within this context ZeRO-3 shards frozen parameters of the unit over the ranks of a group; None: over all.

    hpZ, which DeepSpeed has for this, keeps a second set of shards inside the node beside the one over all ranks.
    """
    if group is None:
        yield
        return
    for parameter in unit.parameters():
        if not parameter.requires_grad:
            setattr(parameter, _OWN_GROUP, group)
    yield
    for parameter in unit.parameters():
        gather: Any = parameter.all_gather_coalesced  # type: ignore[attr-defined]
        parameter.all_gather_coalesced = partial(_in_order, gather)  # type: ignore[attr-defined]


def _in_order(gather: Callable[..., Any], parameters: Iterable[Any], **options: Any) -> Any:
    """DeepSpeed goes through a set, whose order differs between ranks; those of two groups must not meet crosswise."""
    return gather(sorted(parameters, key=lambda parameter: parameter.ds_id), **options)


def zero1_masters(optimizer: Any) -> list[torch.Tensor]:
    """This rank's flat float32 masters of DeepSpeed's ZeRO-1 optimizer, one per parameter group."""
    masters: list[torch.Tensor] = optimizer.single_partition_of_fp32_groups
    return masters


def allocate_zero1(optimizer: Any) -> None:
    """Make the state of DeepSpeed's ZeRO-1 optimizer now, so that its size is known before the first step."""
    if hasattr(optimizer.optimizer, "allocate"):
        optimizer.optimizer.allocate(zero1_masters(optimizer))
        # DeepSpeed would tell the parameters where their moments lie after the first step.
        optimizer._lazy_init_hp_params_optimizer_state()


def zero3_masters(optimizer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Group name and flat float32 masters of every sub-group of DeepSpeed's ZeRO-3 optimizer that has any here."""
    names = [group["name"] for group in optimizer.optimizer.param_groups]
    for number, part in enumerate(optimizer.fp32_partitioned_groups_flat):
        if part.numel():
            yield names[optimizer.sub_group_to_group_id[number]], part


def allocate_zero3(optimizer: Any) -> None:
    """Make the state of DeepSpeed's ZeRO-3 optimizer now, so that its size is known before the first step."""
    if hasattr(optimizer.optimizer, "allocate"):
        optimizer.optimizer.allocate(part for _, part in zero3_masters(optimizer))


def zero3_gradients(optimizer: Any) -> torch.Tensor:
    """The buffer in which DeepSpeed's ZeRO-3 optimizer keeps this rank's gradients."""
    gradients: torch.Tensor = optimizer.grad_partitions_flat_buffer
    return gradients


class PipelineStageModule(PipelineModule):
    """DeepSpeed's container around this rank's span of the model, and the process grid.

    DeepSpeed counts one pipeline layer per pipeline stage; which decoder layers that is was decided elsewhere.
    """

    part: TranslationModel

    def __init__(self, pipeline_stages: int) -> None:
        """Set up the process grid (collective); `hold` follows."""
        # DeepSpeed prints what it thinks of the layers.
        with redirect_stdout(io.StringIO()):
            super().__init__([None] * pipeline_stages, num_stages=pipeline_stages, partition_method="uniform")

    def hold(self, part: TranslationModel) -> None:
        """Take the span in."""
        self.part = part
        self.forward_funcs = [part]
        for parameter in self.parameters():
            parameter.ds_pipe_replicated = False
        self.to(accelerator.device())

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """What the span computes."""
        return self.part(*inputs, **options)

    def destroy_groups(self) -> None:
        """Give the process groups of the grid back (collective).

        Each has connections and threads of its own, which DeepSpeed would keep until the process ends.
        """
        groups.mpu = None
        # None of them may be in use anywhere any more.
        collectives.barrier()
        grid = self._grid
        of_grid = (grid.ds_model_proc_group, grid.dp_proc_group, grid.pp_proc_group, grid.slice_proc_group)
        for group in dict.fromkeys((*of_grid, self.world_group)):
            dist.destroy_process_group(group)


class _Zero1ForEveryType:
    """Mixin of DeepSpeed's engines under ZeRO-1."""

    gradient_bytes = 0
    """Bytes of the gradients that the last step held at its end."""

    def _do_optimizer_sanity_check(self, basic_optimizer: Any) -> Any:
        """ZeRO-1 for every type: the optimizer that DeepSpeed takes for bfloat16 holds whole float32 gradients twice
        and computes their norm in a way of its own."""
        return ZERO_OPTIMIZATION


def _skip_by_norm(optimizer: Any) -> None:
    """Let DeepSpeed's ZeRO-1 optimizer skip a step when the gradient norm is invalid, in every type.

    It would look for infinities in every gradient before, which the norm says already.
    """
    optimizer.check_grad_overflow = True
    optimizer.check_overflow = lambda **_: None


class ReplicatedEngine(_Zero1ForEveryType, DeepSpeedEngine):
    """DeepSpeedEngine under ZeRO-1, or without optimizer where nothing is trained.

    Its constructor gives every rank the parameters of rank 0.
    """

    def __init__(
        self, module: TranslationModel, config: dict[str, Any], optimizer: torch.optim.Optimizer | None
    ) -> None:
        """Make the engine.

        Args:
            module: the whole model.
            config: resolved DeepSpeed configuration.
            optimizer: None when nothing is trained.
        """
        super().__init__(
            args=None,
            model=module,
            optimizer=optimizer,
            config=config,
            config_class=DeepSpeedConfig(config),
            dist_init_required=False,
        )
        if optimizer is not None:
            _skip_by_norm(self.optimizer)

    def allreduce_gradients(self, *args: Any, **options: Any) -> None:
        """As DeepSpeed's; with the last micro-batch of a step gradients are counted first."""
        if self.is_gradient_accumulation_boundary():
            self.gradient_bytes = sum(_gradient_bytes(p) for p in self.module.parameters())
        super().allreduce_gradients(*args, **options)


def _by_name(name: str) -> Callable[..., None]:
    return lambda engine, **arguments: getattr(engine, name)(**arguments)


class PipelineStageEngine(_Zero1ForEveryType, PipelineEngine):
    """PipelineEngine whose pipeline stages may train nothing, pass no gradients down, and differ in their groups."""

    def __init__(
        self, module: PipelineStageModule, config: dict[str, Any], optimizer: torch.optim.Optimizer | None
    ) -> None:
        """Make the engine.

        Args:
            module: holds this rank's span.
            config: resolved DeepSpeed configuration.
            optimizer: of this span; None when it trains nothing.
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
        self.part = module.part
        self._batches: Sequence[PackedBatch] = ()
        self._totals, self._scale = BatchTotals(1, 1), 1.0
        self._options: dict[str, Any] = {}
        self._forwards = self._backwards = self._received = 0
        self._gradients: dict[int, list[torch.Tensor]] = {}
        self.figures = Figures.nothing(self.part)
        if self._trains:
            self._join_pipeline_stages(self.optimizer)

    def run(
        self,
        commands: type[schedule.PipeSchedule],
        batches: Sequence[PackedBatch],
        totals: BatchTotals,
        scale: float = 1.0,
        **options: Any,
    ) -> Figures:
        """Execute a schedule over micro-batches; returns what this rank computed of them.

        Args:
            commands: the schedule.
            batches: this data-parallel rank's micro-batches.
            totals: sizes of the global batch.
            scale: factor of the gradients.
            options: for `TranslationModel.forward`.
        """
        self._batches, self._totals, self._scale, self._options = batches, totals, scale, options
        self._forwards = self._backwards = self._received = 0
        self.figures = Figures.nothing(self.part)
        self._exec_schedule(commands(len(batches), self.num_stages, self.stage_id))
        self._batches, self._options = (), {}
        return self.figures

    def close(self) -> None:
        """Let go of DeepSpeed's state, its process-wide grid and the process groups of that included (collective).

        Not `destroy` itself, which DeepSpeed also calls when the object is collected, alone on one rank.
        """
        self.destroy()
        self.module.destroy_groups()

    # DeepSpeed's table holds functions; this one finds methods of subclasses too.
    _INSTRUCTION_MAP: ClassVar[dict[type, Callable[..., None]]] = {
        command: _by_name(method.__name__) for command, method in PipelineEngine._INSTRUCTION_MAP.items()
    }

    def _exec_load_micro_batch(self, buffer_id: int) -> None:
        """Nothing: every pipeline stage has planned the micro-batches itself."""

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
        outputs = forward(batch, self._totals, *inputs, **self._options)
        if self.is_last_stage():
            loss, per_pair, budget = outputs
            self.figures.add(per_pair, budget)
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
        gradients = self._gradients.pop(buffer_id, None) or [torch.full_like(outputs[0], self._scale)]
        self._differentiate(outputs, gradients)

    def _exec_send_grads(self, buffer_id: int) -> None:
        if self.part.crosses(self.part.span.start):
            for tensor in self.pipe_buffers["inputs"][buffer_id]:
                p2p.send(tensor.grad.contiguous(), self.prev_stage)
        self.pipe_buffers["inputs"][buffer_id] = None

    def _exec_reduce_tied_grads(self) -> None:
        """Nothing: tensors that two pipeline stages hold are frozen."""

    def _exec_reduce_grads(self) -> None:
        if self._trains:
            self.gradient_bytes = sum(_gradient_bytes(p) for p in self.part.parameters())
            super()._exec_reduce_grads()

    def _exec_optimizer_step(self, lr_kwargs: Any = None) -> None:
        if self._trains:
            super()._exec_optimizer_step(lr_kwargs)
            return
        norm = self._norm_over_pipeline_stages(torch.zeros(()))
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

    # The gradient norm: DeepSpeed adds it up over pipeline stages once per parameter group, but these
    # differ in their groups.

    def _join_pipeline_stages(self, optimizer: Any) -> None:
        """Let DeepSpeed's optimizer see one pipeline stage, and add up the norm over all once."""
        optimizer.model_parallel_group, optimizer.model_parallel_rank = None, 0
        of_this = optimizer.scaled_global_norm
        optimizer.scaled_global_norm = lambda norm_type=2: self._norm_over_pipeline_stages(of_this(norm_type))
        # All skip the step when the norm over pipeline stages is invalid; none may decide that alone.
        _skip_by_norm(optimizer)

    def _norm_over_pipeline_stages(self, norm: torch.Tensor) -> torch.Tensor:
        """The norm over all pipeline stages from that of each; negative (DeepSpeed's sign for invalid) when any is."""
        value = float(norm)
        summed = torch.tensor(
            [value**2, float(not value >= 0.0)], dtype=torch.float64, device=accelerator.device()
        )
        dist.all_reduce(summed, group=self.grid.get_pipe_parallel_group())
        return norm.new_tensor(-1.0 if summed[1] > 0 else math.sqrt(summed[0]))


def _gradient_bytes(parameter: nn.Parameter) -> int:
    return bytes_of([parameter.grad, getattr(parameter, "grad_accum", None)])


class _ShownAsZero1(DeepSpeedEngine):
    """Stands between PipelineEngine and DeepSpeedEngine: once DeepSpeedEngine is set up for ZeRO-3, it tells
    PipelineEngine's constructor, which refuses ZeRO stages above 1, that the ZeRO stage is 1."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._shown: int | None = 1

    def zero_optimization_stage(self) -> int:
        shown = self.__dict__.get("_shown")
        zero_stage: int = super().zero_optimization_stage()
        return zero_stage if shown is None else shown


class Zero3PipelineStageEngine(PipelineStageEngine, _ShownAsZero1):
    """PipelineStageEngine whose pipeline stages are sharded by ZeRO-3.

    DeepSpeed refuses that, because with everything trained it would reduce all gradients after every micro-batch. Here
    nearly everything is frozen: gradients are few, and the weights are what fills memory.
    """

    def __init__(
        self, module: PipelineStageModule, config: dict[str, Any], optimizer: torch.optim.Optimizer | None
    ) -> None:
        """As PipelineStageEngine."""
        self._trains = optimizer is not None
        group = module.mpu().get_data_parallel_group()
        _compare_within(group)
        with _barriers_within(group):
            super().__init__(module, config, optimizer)
        self._shown = None
        # Gradients are partitioned after every micro-batch, not once at the end.
        self.enable_backward_allreduce = True

    def _join_pipeline_stages(self, optimizer: Any) -> None:
        optimizer.model_parallel_group, optimizer.model_parallel_rank = None, 0
        of_groups = optimizer._get_norm_groups
        optimizer._get_norm_groups = lambda: [self._norm_over_pipeline_stages(_combined(of_groups()))]

    def _exec_backward_pass(self, buffer_id: int) -> None:
        # Offloaded gradients move to the host with the last micro-batch.
        self._force_grad_boundary = self._backwards + 1 == len(self._batches)
        super()._exec_backward_pass(buffer_id)
        self._force_grad_boundary = False
        if self._trains:
            # DeepSpeed counts micro-batches when the next forward pass begins; at the end of the schedule there is none.
            self.optimizer.clear_backward_seen_flag()

    def _exec_reduce_grads(self) -> None:
        """Nothing: every backward pass has reduced its gradients."""

    def close(self) -> None:
        """Also give DeepSpeed its function back (collective)."""
        super().close()
        coordinator.assert_ints_same_as_other_ranks = _COMPARE_ALL
        _align_numbers()


def _combined(norms: list[torch.Tensor]) -> torch.Tensor:
    """Norm of the whole pipeline stage from the norms of its groups, of which a negative one is invalid."""
    stacked = torch.stack([torch.as_tensor(norm, dtype=torch.float32) for norm in norms])
    return stacked.new_tensor(-1.0) if (stacked < 0).any() else torch.linalg.vector_norm(stacked)


_COMPARE_ALL = coordinator.assert_ints_same_as_other_ranks


def _compare_within(group: Any) -> None:
    """Let ZeRO-3 compare the order of modules among the ranks of a pipeline stage: others run other modules.

    This replaces one function in a module of DeepSpeed until the engine is destroyed.
    """

    def assert_ints_same_as_other_ranks(ints: list[int]) -> None:
        # Python's hash of integers is the same in every process.
        digest = hash(tuple(ints)) >> 1
        extremes = torch.tensor([digest, -digest], device=accelerator.device())
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
        if extremes.tolist() != [digest, -digest]:
            raise RuntimeError(
                f"the ranks of a pipeline stage disagree on the order in which modules run; this one has {ints}"
            )

    coordinator.assert_ints_same_as_other_ranks = assert_ints_same_as_other_ranks


@contextmanager
def _barriers_within(group: Any) -> Iterator[None]:
    """Within this context DeepSpeed's barriers are for the ranks of a pipeline stage: ZeRO-3's optimizer has some in
    its constructor, and pipeline stages that train nothing have no optimizer."""
    of_world = deepspeed.comm.barrier
    deepspeed.comm.barrier = lambda *_, **__: of_world(group)
    try:
        yield
    finally:
        deepspeed.comm.barrier = of_world


def _align_numbers() -> None:
    """Let all ranks number parameters and modules alike from now on (collective).

    DeepSpeed counts both per process and compares them between ranks; pipeline stages have had different ones, and the next
    engine of this process group may shard over other ranks.
    """
    modules = DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0]
    counts = collectives.gather_objects((Init.param_id, modules[0]))
    Init.param_id, modules[0] = (max(numbers) for numbers in zip(*counts, strict=True))
