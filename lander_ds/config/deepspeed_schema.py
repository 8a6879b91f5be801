"""Every key that DeepSpeed reads from its JSON, as pydantic models.

DeepSpeed itself checks only the sections that are pydantic models in its source; those models are used here.
The top level and the sections that DeepSpeed reads with plain `dict.get` are written out below, because there
a misspelt key passes silently (a test compares them with DeepSpeed's source).

Importing this module imports DeepSpeed, which takes seconds.
"""

from __future__ import annotations

import logging
from typing import Annotated, Any, Literal

from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.runtime import config as deepspeed_config
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import BaseModel, ConfigDict, Field

# DeepSpeed's logger writes to standard output, which carries results here: its lines go where ours go.
logging.getLogger("DeepSpeed").handlers.clear()
logging.getLogger("DeepSpeed").propagate = True

Count = Annotated[int, Field(ge=1)]
Type = Literal["fp32", "fp16", "bf16"]


class Section(BaseModel):
    """A section whose keys are all known."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ActivationCheckpointing(Section):
    """`activation_checkpointing`."""

    partition_activations: bool = False
    number_checkpoints: Count | None = None
    contiguous_memory_optimization: bool = False
    synchronize_checkpoint_boundary: bool = False
    profile: bool = False
    cpu_checkpointing: bool = False


class Pipeline(Section):
    """`pipeline`."""

    stages: Count | Literal["auto"] | None = None
    partition: str | None = None
    seed_layers: bool = False
    activation_checkpoint_interval: Annotated[int, Field(ge=0)] | Literal["auto"] | None = None
    pipe_partitioned: bool = True
    grad_partitioned: bool = True
    use_reentrant: bool | None = None


class FlopsProfiler(Section):
    """`flops_profiler`."""

    enabled: bool = False
    recompute_fwd_factor: Annotated[float, Field(ge=0)] = 0.0
    profile_step: Count = 1
    module_depth: Annotated[int, Field(ge=-1)] = -1
    top_modules: Count = 1
    detailed: bool = True
    output_file: str | None = None


class Aio(Section):
    """`aio`."""

    block_size: Count = 1048576
    queue_depth: Count = 8
    intra_op_parallelism: Count = 1
    single_submit: bool = False
    overlap_events: bool = True
    use_gds: bool = False


class DataTypes(Section):
    """`data_types`."""

    grad_accum_dtype: Type | None = None
    param_dtype: Type | None = None
    buffer_dtype: Type | None = None
    keep_in_fp32_modules: Literal["auto"] | list[str] = "auto"


class Timers(Section):
    """`timers`."""

    throughput: DeepSpeedThroughputTimerConfig | None = None


class AdamParameters(Section):
    """`optimizer.params`, where DeepSpeed accepts any key."""

    lr: Any = None
    betas: Any = None
    eps: Any = None
    weight_decay: Any = None
    torch_adam: Any = None
    adam_w_mode: Any = None
    bias_correction: Any = None
    amsgrad: Any = None
    fused: Any = None
    foreach: Any = None
    fp32_optimizer_states: Any = None


class Optimizer(Section):
    """`optimizer`."""

    type: Literal["Adam", "AdamW"]
    params: AdamParameters = Field(default_factory=AdamParameters)
    legacy_fusion: bool = False


class DeepSpeedJson(Section):
    """The whole file. Keys whose value may be "auto" are `deepspeed_strict.AUTO`."""

    train_batch_size: Count | None = None
    train_micro_batch_size_per_gpu: Count | None = None
    gradient_accumulation_steps: Count | None = None
    managed_gradient_accumulation: bool = True
    gradient_clipping: Annotated[float, Field(ge=0)] | None = None
    zero_optimization: DeepSpeedZeroConfig | None = None
    bf16: DeepSpeedBF16Config | None = None
    fp16: DeepSpeedFP16Config | None = None
    data_types: DataTypes | None = None
    optimizer: Optimizer | None = None
    zero_allow_untested_optimizer: bool = True
    zero_force_ds_cpu_optimizer: bool = False
    activation_checkpointing: ActivationCheckpointing | None = None
    pipeline: Pipeline | None = None
    communication_data_type: Type | None = None
    seq_parallel_communication_data_type: Type | None = None
    prescale_gradients: bool = False
    gradient_predivide_factor: Annotated[float, Field(gt=0)] = 1.0
    gradient_allreduce_op: Literal["mean", "sum"] = "mean"
    disable_allgather: bool = False
    dataloader_drop_last: bool = False
    use_data_before_expert_parallelism: bool = False
    compile: CompileConfig | None = None
    aio: Aio | None = None
    flops_profiler: FlopsProfiler | None = None
    comms_logger: CommsLoggerConfig | None = None
    timers: Timers | None = None
    tensorboard: TensorBoardConfig | None = None
    wandb: WandbConfig | None = None
    csv_monitor: CSVConfig | None = None
    comet: CometConfig | None = None
    steps_per_print: Count | None = None
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False
    disable_python_gc: bool = False
    vocabulary_size: Count | None = None
    log_level: str | None = None


_DATA = "lander_ds plans every global batch itself; remove it"
_LAYOUT = "the recipe's topology decides how the model is spread; remove it"
_CHECKPOINT = "lander_ds writes its own checkpoints, which any number of ranks can resume; remove it"

REFUSED: dict[str, str] = {
    "scheduler": "learning rates follow the recipe; remove it and set train.schedule, train.warmup_steps and "
    "train.min_lr_ratio there",
    "data_efficiency": _DATA,
    "autotuning": "the autotuner would change values that the recipe fixes; remove it",
    "hybrid_engine": "it replaces modules that lander_ds routes; remove it",
    "torch_autocast": "model.dtype in the recipe is the type of the arithmetic; remove it",
    "weight_quantization": "it would change frozen weights; remove it",
    "tensor_parallel": _LAYOUT,
    "expert_parallel": _LAYOUT,
    "sequence_parallel_size": _LAYOUT,
    "checkpoint": _CHECKPOINT,
    "datastates_ckpt": _CHECKPOINT,
    # DeepSpeed's own words on features that it has removed.
    **{
        key: f"{text.strip()} Remove it."
        for key, text in deepspeed_config._REMOVED_TOP_LEVEL_CONFIG_KEYS.items()
    },
}
"""Top-level keys that DeepSpeed knows, or once knew, and this trainer cannot honour: why, and the cure."""

_QUANTISED = "frozen weights must stay what they are, and this rounds what is communicated; remove it"
_MASTERS = "the optimizer always keeps float32 masters and moments; remove it"
_SECOND_OPTIMIZER = (
    "DeepSpeed would step a second optimizer that does not know which banks are active; remove it"
)
_RECOMPUTED = (
    "the recipe says what is recomputed; remove it and set train.activation_checkpointing: true there if layers "
    "are to be recomputed"
)

REFUSED_WHEN_SET: dict[tuple[str, ...], str] = {
    ("zero_optimization", "zero_quantized_weights"): _QUANTISED,
    ("zero_optimization", "zero_quantized_nontrainable_weights"): _QUANTISED,
    ("zero_optimization", "zero_quantized_gradients"): _QUANTISED,
    ("zero_optimization", "legacy_stage1"): "DeepSpeed has dropped it; remove it",
    ("zero_optimization", "zenflow"): _SECOND_OPTIMIZER,
    ("zero_optimization", "offload_optimizer", "super_offload"): _SECOND_OPTIMIZER,
    ("bf16", "bf16_master_weights_and_grads"): _MASTERS,
    ("bf16", "bf16_optimizer_states"): _MASTERS,
    ("fp16", "fp16_master_weights_and_grads"): _MASTERS,
    ("compile", "deepcompile"): "it recompiles the forward pass without the gates' control flow; remove it",
    ("disable_allgather",): "ZeRO-3 has to gather the weights; remove it",
    ("prescale_gradients",): "lander_ds undoes how DeepSpeed averages gradients; remove it",
    **{("activation_checkpointing", name): _RECOMPUTED for name in ActivationCheckpointing.model_fields},
    ("pipeline", "partition"): "layers are balanced by compute; remove it, or set pipeline_cut in the recipe",
    ("pipeline", "seed_layers"): "everything random follows the recipe's seed; remove it",
}
"""Keys that may be present, but not with a value other than false, 0 or null: why, and the cure."""

REFUSED_IN_ZERO: dict[str, str] = deepspeed_config._REMOVED_ZERO_CONFIG_KEYS
"""Keys of `zero_optimization` that DeepSpeed has removed."""
