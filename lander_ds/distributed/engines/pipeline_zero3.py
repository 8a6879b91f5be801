"""Topology pipeline_zero3: every pipeline stage shards all its parameters over its own ranks with ZeRO-3.

DeepSpeed refuses ZeRO-3 in pipelines, because with everything trained it would reduce all gradients after every
micro-batch. Here nearly everything is frozen: gradients are few, and the weights are what fills memory.

Everything that this file relies on inside DeepSpeed is checked at the start (`check_deepspeed`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.topology import PipelineParallelGrid
from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partition_parameters import Init
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import nn

from lander_ds.common.errors import ConfigError
from lander_ds.distributed import collectives, process_group
from lander_ds.distributed.engines.engine import RankBytes
from lander_ds.distributed.engines.pipeline import Pipeline, StageEngine, StageModule
from lander_ds.distributed.engines.zero3 import allocate, partitioner, set_shard, zero3_bytes, zero3_masters
from lander_ds.models.loading import Placement

TESTED = ("0.19.",)
"""Starts of the DeepSpeed versions this was tested with."""

_RELIED_ON: tuple[tuple[Any, str], ...] = (
    (DeepSpeedEngine, "zero_optimization_stage"),
    (DeepSpeedEngine, "_backward_epilogue"),
    (DeepSpeedEngine, "_do_optimizer_sanity_check"),
    (PipelineEngine, "_exec_schedule"),
    (Init, "param_id"),
    (DeepSpeedZeRoOffload, "_register_deepspeed_module"),
    (coordinator, "assert_ints_same_as_other_ranks"),
    (DeepSpeedZeroOptimizer_Stage3, "_get_norm_groups"),
    (DeepSpeedZeroOptimizer_Stage3, "clear_backward_seen_flag"),
    (DeepSpeedZeroOptimizer_Stage3, "independent_gradient_partition_epilogue"),
)


def check_deepspeed() -> None:
    """Refuse a DeepSpeed in which what this file relies on has moved.

    Raises:
        ConfigError: names the version and what is missing.
    """
    found = version("deepspeed")
    missing = [f"{owner.__name__}.{name}" for owner, name in _RELIED_ON if not hasattr(owner, name)]
    if "zero_optimization_stage" not in inspect.getsource(PipelineEngine.__init__):
        missing.append("the refusal of ZeRO-3 in PipelineEngine.__init__")
    if missing or not found.startswith(TESTED):
        what = f"lacks {', '.join(missing)}" if missing else "was never tested with it"
        raise ConfigError(
            f"topology: pipeline_zero3 reaches into DeepSpeed, and DeepSpeed {found} {what}: install the version in "
            "requirements.txt, or write topology: pipeline or zero3"
        )


class _ShownAsZero1(DeepSpeedEngine):
    """Stands between PipelineEngine and DeepSpeedEngine: once DeepSpeedEngine is set up for ZeRO-3, it tells
    PipelineEngine's constructor, which refuses stages above 1, that the stage is 1."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._shown: int | None = 1

    def zero_optimization_stage(self) -> int:
        shown = self.__dict__.get("_shown")
        stage: int = super().zero_optimization_stage()
        return stage if shown is None else shown


class Zero3StageEngine(StageEngine, _ShownAsZero1):
    """Pipeline engine whose stages are sharded."""

    def __init__(
        self, module: StageModule, config: dict[str, Any], optimizer: torch.optim.Optimizer | None
    ) -> None:
        """As StageEngine."""
        self._trains = optimizer is not None
        group = module.mpu().get_data_parallel_group()
        _compare_within(group)
        with _barriers_within(group):
            super().__init__(module, config, optimizer)
        self._shown = None
        # Gradients are partitioned after every micro-batch, not once at the end.
        self.enable_backward_allreduce = True

    def _join_stages(self, optimizer: Any) -> None:
        optimizer.model_parallel_group, optimizer.model_parallel_rank = None, 0
        of_groups = optimizer._get_norm_groups
        optimizer._get_norm_groups = lambda: [self._norm_over_stages(_combined(of_groups()))]

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


def _combined(norms: list[torch.Tensor]) -> torch.Tensor:
    """Norm of the whole stage from the norms of its groups, of which a negative one is invalid."""
    stacked = torch.stack([torch.as_tensor(norm, dtype=torch.float32) for norm in norms])
    return stacked.new_tensor(-1.0) if (stacked < 0).any() else torch.linalg.vector_norm(stacked)


_COMPARE_ALL = coordinator.assert_ints_same_as_other_ranks


def _compare_within(group: Any) -> None:
    """Let ZeRO-3 compare the order of modules among the ranks of a stage: stages run different modules.

    This replaces one function in a module of DeepSpeed until the engine is destroyed.
    """

    def assert_ints_same_as_other_ranks(ints: list[int]) -> None:
        # Python's hash of integers is the same in every process.
        digest = hash(tuple(ints)) >> 1
        extremes = torch.tensor([digest, -digest], device=process_group.device())
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
        if extremes.tolist() != [digest, -digest]:
            raise RuntimeError(
                f"the ranks of a pipeline stage disagree on the order in which modules run; this one has {ints}"
            )

    coordinator.assert_ints_same_as_other_ranks = assert_ints_same_as_other_ranks


@contextmanager
def _barriers_within(group: Any) -> Iterator[None]:
    """Within this context DeepSpeed's barriers are for the ranks of a stage: ZeRO-3's optimizer has some in its
    constructor, and stages that train nothing have no optimizer."""
    of_world = deepspeed.comm.barrier
    deepspeed.comm.barrier = lambda *_, **__: of_world(group)
    try:
        yield
    finally:
        deepspeed.comm.barrier = of_world


def _align_numbers() -> None:
    """Let all ranks number parameters and modules alike from now on (collective).

    DeepSpeed counts both per process and compares them between ranks; stages have had different ones, and the next
    engine of this process group may shard over other ranks.
    """
    modules = DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0]
    counts = collectives.gather_objects((Init.param_id, modules[0]))
    Init.param_id, modules[0] = (max(numbers) for numbers in zip(*counts, strict=True))


class PipelineZero3(Pipeline):
    """Pipeline stages with ZeRO-3."""

    def _place(self, config: dict[str, Any], grid: PipelineParallelGrid) -> Placement:
        return partitioner(config, grid)

    def _make_engine(
        self, module: StageModule, config: dict[str, Any], optimizer: torch.optim.Optimizer | None
    ) -> StageEngine:
        return Zero3StageEngine(module, config, optimizer)

    def _allocate(self) -> None:
        allocate(self._engine.optimizer)

    def _masters(self) -> Iterator[tuple[str, torch.Tensor]]:
        return zero3_masters(self._engine.optimizer)

    def _set_state(self, parameter: nn.Parameter, value: torch.Tensor, moment: str | None) -> None:
        set_shard(parameter, value, moment)

    def rank_bytes(self) -> RankBytes:
        """Shards of the stage's weights and gradients; float32 masters and moments."""
        return zero3_bytes(self.model, self._engine.optimizer if self._trains else None)

    def destroy(self) -> None:
        """Let go of DeepSpeed's state and give its function back."""
        super().destroy()
        coordinator.assert_ints_same_as_other_ranks = _COMPARE_ALL
        _align_numbers()
