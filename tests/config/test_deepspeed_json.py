"""The DeepSpeed JSON: strict on all levels, compared with the recipe, completed."""

from __future__ import annotations

import ast
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime import config as deepspeed_config
from deepspeed.runtime import constants
from deepspeed.runtime.activation_checkpointing.config import ACT_CHKPT_DEFAULT
from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
from support.workspace import DEEPSPEED, Workspace

from lander_ds.common.errors import ConfigError
from lander_ds.config import deepspeed_schema as schema
from lander_ds.config.deepspeed_json import (
    check_deepspeed_json,
    load_deepspeed_json,
    resolve_deepspeed_config,
    resolve_inference_config,
)
from lander_ds.config.loading import load_recipe
from lander_ds.config.recipe import Recipe

JSONS = sorted((Path(__file__).parents[2] / "ds_configs").rglob("*.json"))


def recipe_of(workspace: Workspace, *overrides: str) -> Recipe:
    return load_recipe(workspace.recipe, overrides)


def refusal(workspace: Workspace, *overrides: str, **changes: Any) -> str:
    workspace.write_deepspeed(**changes)
    with pytest.raises(ConfigError) as caught:
        check_deepspeed_json(recipe_of(workspace, *overrides))
    return str(caught.value)


PIPELINE = ["topology=pipeline", "pipeline_stages=2"]
BOTH = ["topology=pipeline_zero3", "pipeline_stages=2"]
REPLICATED = ["topology=replicated"]


@pytest.mark.parametrize("path", JSONS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_shipped_json_is_accepted(path: Path) -> None:
    assert load_deepspeed_json(path) == json.loads(path.read_text())


def deepspeed_keys() -> set[str]:
    """Every top-level key that DeepSpeed's configuration class reads, from its source."""
    actual: set[str] = set()
    for node in ast.walk(ast.parse(inspect.getsource(deepspeed_config))):
        key: ast.expr | None = None
        match node:
            case ast.Call(func=ast.Name(id="get_scalar_param"), args=[ast.Name(id="param_dict"), name, *_]):
                key = name
            case ast.Call(func=ast.Attribute(value=ast.Name(id="param_dict"), attr="get"), args=[name, *_]):
                key = name
            case ast.Subscript(value=ast.Name(id="param_dict"), slice=name):
                key = name
        match key:
            case ast.Constant(value=str(text)):
                actual.add(text)
            case ast.Name(id=constant) if hasattr(deepspeed_config, constant):
                actual.add(getattr(deepspeed_config, constant))
    return actual


def test_every_key_that_deepspeed_reads_is_known() -> None:
    known = set(schema.DeepSpeedJson.model_fields) | set(schema.REFUSED)
    read = deepspeed_keys()
    assert len(read) > 25
    assert read - known == set()


def test_sections_without_a_model_have_deepspeeds_keys() -> None:
    assert set(schema.ActivationCheckpointing.model_fields) == set(ACT_CHKPT_DEFAULT)
    assert set(schema.Aio.model_fields) == set(AIO_DEFAULT_DICT)
    read_elsewhere = {"use_reentrant"}
    assert set(schema.Pipeline.model_fields) == set(deepspeed_config.get_pipeline_config({})) | read_elsewhere
    data_types = {"GRAD_ACCUM_DTYPE", "PARAM_DTYPE", "BUFFER_DTYPE", "KEEP_IN_FP32_MODULES"}
    assert set(schema.DataTypes.model_fields) == {getattr(constants, name) for name in data_types}


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        (
            {"zero_optimisation": {}},
            "zero_optimisation: DeepSpeed has no such key; did you mean zero_optimization?",
        ),
        ({"stage": 3}, "did you mean zero_optimization.stage?"),
        ({"zero_optimization": {"stage": "3"}}, "expected a number, found the text '3'; write 3"),
        (
            {"zero_optimization": {"overlap_comm": 1}},
            "expected true or false, found the number 1; write true",
        ),
        ({"zero_optimization": {"reduce_bucket_size": -1}}, "zero_optimization.reduce_bucket_size: "),
        ({"zero_optimization": {"cpu_offload": True}}, "deprecated by DeepSpeed; write offload_optimizer"),
        ({"zero_optimization": {"mics_shard_size": 2}}, "MiCS"),
        ({"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}}, "offload_optimizer.device?"),
        ({"zero_optimization": {"offload_param": {"device": "disk"}}}, "offload_param.device: "),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "needs nvme_path"),
        (
            {"zero_optimization": {"offload_param": {"device": "nvme", "nvme_path": "/no/dir"}}},
            "is no directory",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            "offload_optimizer.ratio",
        ),
        ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, "zenflow: DeepSpeed would step a second"),
        (
            {"zero_optimization": {"zero_quantized_gradients": True}},
            "zero_quantized_gradients: frozen weights",
        ),
        ({"zero_optimization": True}, "zero_optimization: expected an object { }, found true"),
        ({"bf16": {"enabled": "auto", "bf16_master_weights_and_grads": True}}, "float32 masters"),
        ({"elasticity": {"enabled": True}}, "elasticity: Elastic training has been removed"),
        ({"compression_training": {}}, "compression_training: "),
        ({"curriculum_learning": {}}, "curriculum_learning: "),
        ({"data_efficiency": {}}, "plans every global batch itself"),
        ({"scheduler": {"type": "WarmupLR"}}, "set train.schedule"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, "set train.lr in the recipe"),
        (
            {"optimizer": {"type": "AdamW", "params": {"wieght_decay": 0}}},
            "did you mean optimizer.params.weight_decay?",
        ),
        ({"optimizer": {"type": "AdamW", "parms": {}}}, "did you mean optimizer.params?"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type: "),
        ({"data_types": {"grad_accum_dtype": "float32"}}, "data_types.grad_accum_dtype: "),
        (
            {"activation_checkpointing": {"cpu_checkpoint": True}},
            "activation_checkpointing.cpu_checkpointing?",
        ),
        ({"tensorboard": {"enabled": True, "output_pth": "x"}}, "did you mean tensorboard.output_path?"),
        ({"zero_allow_untested_optimizer": False}, "zero_allow_untested_optimizer: "),
        ({"prescale_gradients": True}, "prescale_gradients: lander_ds undoes"),
        ({"gradient_predivide_factor": 2}, "gradient_predivide_factor: lander_ds undoes"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op: lander_ds relies on mean"),
        ({"zero_optimization": {"legacy_stage1": True}}, "legacy_stage1: DeepSpeed has dropped it"),
        (
            {"activation_checkpointing": {"cpu_checkpointing": True}},
            "activation_checkpointing.cpu_checkpointing: the recipe says what is recomputed; remove it and set "
            "train.activation_checkpointing: true",
        ),
        ({"activation_checkpointing": {"partition_activations": True}}, "train.activation_checkpointing"),
        ({"activation_checkpointing": {"number_checkpoints": 4}}, "train.activation_checkpointing"),
        ({"pipeline": {"partition": "uniform"}}, "pipeline.partition: layers are balanced by compute"),
        ({"pipeline": {"seed_layers": True}}, "pipeline.seed_layers: everything random follows"),
        ({"pipeline": {"use_reentrant": False}}, "pipeline.use_reentrant: lander_ds recomputes"),
        ({"pipeline": {"partitions": "best"}}, "did you mean pipeline.partition?"),
        ({"pipeline": {"stages": "two"}}, "pipeline.stages: "),
        ({"steps_per_print": 0}, "steps_per_print: "),
    ],
)
def test_refused(changes: dict[str, Any], fragment: str, workspace: Workspace) -> None:
    message = refusal(workspace, **changes)
    assert fragment in message
    assert f"{workspace.deepspeed.name}, line " in message or "problems" in message


@pytest.mark.parametrize(
    ("overrides", "changes", "fragments"),
    [
        ([], {"gradient_clipping": 0.5}, ["gradient_clipping", "train.clip: 1", "found 0.5"]),
        ([], {"train_micro_batch_size_per_gpu": 4}, ["train.micro_batch: 1", "found 4"]),
        ([], {"gradient_accumulation_steps": 2}, ["train.batch_tokens", "found 2"]),
        ([], {"train_batch_size": 8}, ["train_batch_size", "train.batch_tokens"]),
        ([], {"bf16": {"enabled": True}}, ["bf16.enabled", "model.dtype: float32", "found true"]),
        (["model.dtype=bfloat16"], {"fp16": {"enabled": True}}, ["fp16.enabled", "model.dtype: bfloat16"]),
        ([], {"zero_optimization": {"stage": 2}}, ["zero_optimization.stage", "topology: zero3"]),
        ([], {"remove": "zero_optimization"}, ["zero_optimization.stage", "found 0"]),
        (PIPELINE, {}, ["zero_optimization.stage", "topology: pipeline, which needs 1, found 3; write 1"]),
        (BOTH, {"zero_optimization": {"stage": 1}}, ["topology: pipeline_zero3, which needs 3, found 1"]),
        (
            REPLICATED,
            {},
            ["zero_optimization.stage", "topology: replicated, which needs 1, found 3; write 1"],
        ),
        ([], {"pipeline": {"stages": 2}}, ["pipeline.stages", "pipeline_stages: 1", "found 2"]),
        (BOTH, {"pipeline": {"stages": 4}}, ["pipeline.stages", "pipeline_stages: 2", "found 4"]),
        (
            BOTH,
            {"pipeline": {"activation_checkpoint_interval": 1}},
            ["pipeline.activation_checkpoint_interval", "train.activation_checkpointing: false", "found 1"],
        ),
        (
            ["train.optimizer=sgd"],
            {"optimizer": {"type": "AdamW"}},
            ["optimizer.type", "train.optimizer: sgd"],
        ),
    ],
)
def test_contradictions_name_both_keys(
    overrides: list[str], changes: dict[str, Any], fragments: list[str], workspace: Workspace
) -> None:
    message = refusal(workspace, *overrides, **changes)
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize(
    ("topology", "changes", "fragment"),
    [
        (PIPELINE, {"overlap_comm": True}, "overlap_comm: topology: pipeline: DeepSpeed does not overlap"),
        (
            PIPELINE,
            {"offload_param": {"device": "cpu"}},
            "offload_param: topology: pipeline: only ZeRO stage 3",
        ),
        (
            PIPELINE,
            {"offload_optimizer": {"device": "nvme", "nvme_path": "."}},
            "offload_optimizer.device: topology: pipeline: ZeRO stage 1 offloads to the host alone; write cpu",
        ),
        (
            REPLICATED,
            {"offload_param": {"device": "cpu"}},
            "offload_param: topology: replicated: only ZeRO stage 3 offloads weights; remove it, or set topology: zero3",
        ),
        (
            REPLICATED,
            {"offload_optimizer": {"device": "nvme", "nvme_path": "."}},
            "offload_optimizer.device: topology: replicated: ZeRO stage 1 offloads to the host alone; write cpu",
        ),
        (
            REPLICATED,
            {"compute_grad_norm": False},
            "compute_grad_norm: topology: replicated: the gradient norm",
        ),
        (PIPELINE, {"compute_grad_norm": False}, "compute_grad_norm: topology: pipeline: the gradient norm"),
        (BOTH, {"overlap_comm": True}, "overlap_comm: topology: pipeline_zero3: DeepSpeed does not overlap"),
        (BOTH, {"stage3_prefetch_bucket_size": 1}, "stage3_prefetch_bucket_size: topology: pipeline_zero3: "),
        (BOTH, {"prefetch_bucket_size": 5e7}, "prefetch_bucket_size: topology: pipeline_zero3: "),
        (BOTH, {"stage3_max_reuse_distance": 9}, "does not repeat; write 0 or remove it"),
        (BOTH, {"stage3_allgather_sequential": True}, "it makes DeepSpeed prefetch"),
        (BOTH, {"zero_hpz_partition_size": 2}, "zero_hpz_partition_size: topology: pipeline_zero3: "),
        (
            [*BOTH, "frozen_shards=node"],
            {"zero_hpz_partition_size": 2},
            "hpZ would keep a second set of shards",
        ),
        (["frozen_shards=node"], {"zero_hpz_partition_size": 2}, "hpZ would keep a second set of shards"),
        (BOTH, {"zero_quantized_weights": True}, "zero_quantized_weights: frozen weights must stay"),
        (BOTH, {"zero_quantized_gradients": True}, "zero_quantized_gradients: frozen weights must stay"),
        (BOTH, {"zero_quantized_nontrainable_weights": True}, "frozen weights must stay"),
    ],
)
def test_what_a_topology_cannot_do(
    topology: list[str], changes: dict[str, Any], fragment: str, workspace: Workspace
) -> None:
    stage = 1 if topology in (REPLICATED, PIPELINE) else 3
    message = refusal(workspace, *topology, zero_optimization={"stage": stage, **changes})
    assert fragment in message
    assert "zero3.json, line " in message


@pytest.mark.parametrize(
    ("topology", "zero", "changes"),
    [
        (
            PIPELINE,
            {"stage": 1, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}},
            {},
        ),
        (PIPELINE, {"stage": 1}, {"pipeline": {"stages": "auto", "activation_checkpoint_interval": 0}}),
        (BOTH, {"offload_optimizer": {"device": "cpu"}, "stage3_prefetch_bucket_size": 0}, {}),
        (
            BOTH,
            {"stage3_max_reuse_distance": "auto", "zero_hpz_partition_size": 1},
            {"pipeline": {"stages": 2}},
        ),
        ([], {"overlap_comm": True, "stage3_prefetch_bucket_size": 5e7}, {"pipeline": {"stages": 1}}),
        ([], {}, {"activation_checkpointing": {"partition_activations": False}}),
    ],
)
def test_what_a_topology_can_do(
    topology: list[str], zero: dict[str, Any], changes: dict[str, Any], workspace: Workspace
) -> None:
    workspace.write_deepspeed(zero_optimization=zero, **changes)
    check_deepspeed_json(recipe_of(workspace, *topology))


def test_values_that_agree_with_the_recipe_are_accepted(workspace: Workspace) -> None:
    workspace.write_deepspeed(
        gradient_clipping=1.0,
        train_micro_batch_size_per_gpu=1,
        fp16={"enabled": False},
        optimizer={"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
        zero_optimization={"reduce_bucket_size": 5e8, "stage3_prefetch_bucket_size": "auto"},
    )
    check_deepspeed_json(recipe_of(workspace))


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("", "line 1: not valid JSON"),
        ('{"bf16": {},}', "not valid JSON"),
        ('{\n  // comment\n  "bf16": {}\n}', "line 2: not valid JSON"),
        ('{\n  "bf16": {},\n  "bf16": {}\n}', "line 3: bf16: given twice, first on line 2"),
        ('{\n\t"fp16": {"enabled": false,\n\t"enabled": true}\n}', "line 3: fp16.enabled: given twice"),
        ("[1]", "is an object of keys, found a list of 1"),
        ('{"gradient_clipping": NaN}', "NaN is no JSON number"),
        ('{"gradient_clipping": 1', "not valid JSON"),
    ],
)
def test_files_that_are_no_deepspeed_json(text: str, fragment: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_deepspeed_json(path)
    assert fragment in str(caught.value)
    assert "ds.json" in str(caught.value)


def test_several_problems_come_together(workspace: Workspace) -> None:
    message = refusal(workspace, gradient_clipp1ng=1, zero_optimization={"stagee": 3})
    assert "2 problems" in message
    assert "gradient_clipping?" in message
    assert "zero_optimization.stage?" in message


def test_the_resolved_configuration_says_everything(workspace: Workspace) -> None:
    workspace.write_deepspeed(
        optimizer={"type": "AdamW", "params": {"lr": "auto"}},
        data_types={"keep_in_fp32_modules": "auto"},
        zero_optimization={
            "stage3_prefetch_bucket_size": "auto",
            "offload_param": {"device": "none"},
            "offload_optimizer": {"device": "cpu", "pin_memory": "auto"},
        },
    )
    recipe = recipe_of(workspace, "train.micro_batch=2", "train.clip=0.5", "model.dtype=bfloat16")
    assert resolve_deepspeed_config(recipe, world_size=4, micro_batches=3) == {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "train_batch_size": 24,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "data_types": {"keep_in_fp32_modules": "auto", "grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": False,
            "reduce_bucket_size": 16_777_216,
            "offload_optimizer": {"device": "cpu"},
            "leaf_module": {"classes": []},
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


@pytest.mark.parametrize("name", ["zero3", "replicated", "pipeline", "pipeline_zero3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_shipped_json_of_every_topology_fits_it(name: str, dtype: str, workspace: Workspace) -> None:
    path = next(path for path in JSONS if path.name == f"{name}.json")
    stages = 2 if name.startswith("pipeline") else 1
    recipe = recipe_of(
        workspace,
        f"topology={name}",
        f"pipeline_stages={stages}",
        f"deepspeed={path}",
        f"model.dtype={dtype}",
    )
    config = resolve_deepspeed_config(recipe, world_size=1, micro_batches=3)
    read = deepspeed_config.DeepSpeedConfig(config)
    assert read.zero_optimization_stage == (1 if name in ("replicated", "pipeline") else 3)
    assert not name.startswith("pipeline") or not read.zero_config.overlap_comm
    assert read.bfloat16_config.enabled == (dtype == "bfloat16")
    assert config["data_types"]["grad_accum_dtype"] == "fp32"


def test_a_pipeline_looks_not_ahead_even_where_the_json_is_silent(workspace: Workspace) -> None:
    workspace.write_deepspeed(remove="zero_optimization")
    workspace.deepspeed.write_text(
        '{"zero_optimization": {"stage": 3, "prefetch_bucket_size": 0, "overlap_comm": "auto"}, '
        '"pipeline": {"stages": 2}, "activation_checkpointing": {"profile": false}, "bf16": null}'
    )
    config = resolve_deepspeed_config(recipe_of(workspace, *BOTH), world_size=1, micro_batches=2)
    assert config["zero_optimization"] == {
        "stage": 3,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_reuse_distance": 0,
        "overlap_comm": False,
        "reduce_bucket_size": 16_777_216,
        "leaf_module": {"classes": []},
    }
    # The pipeline engine would act on these.
    assert "pipeline" not in config
    assert "activation_checkpointing" not in config
    read = deepspeed_config.DeepSpeedConfig(config).zero_config
    assert (read.prefetch_bucket_size, read.max_reuse_distance, read.overlap_comm) == (0, 0, False)


def test_sharded_inference_is_zero3_in_every_topology(workspace: Workspace) -> None:
    workspace.write_deepspeed(
        zero_optimization={"stage": 1, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 5}
    )
    recipe = recipe_of(workspace, *PIPELINE, "model.dtype=bfloat16", "train.micro_batch=2")
    config = resolve_inference_config(recipe, world_size=4)
    assert config["zero_optimization"] == {
        "stage": 3,
        "overlap_comm": False,
        "leaf_module": {"classes": []},
    }
    assert config["bf16"] == {"enabled": True}
    assert (config["train_batch_size"], config["gradient_accumulation_steps"]) == (8, 1)
    workspace.write_deepspeed(
        zero_optimization={
            "offload_param": {"device": "cpu"},
            "offload_optimizer": {"device": "cpu"},
            "stage3_param_persistence_threshold": 0,
        }
    )
    for topology in ([], BOTH):
        zero = resolve_inference_config(recipe_of(workspace, *topology), world_size=1)["zero_optimization"]
        assert zero["stage"] == 3
        assert zero["offload_param"] == {"device": "cpu"}
        assert zero["stage3_param_persistence_threshold"] == 0
        assert "offload_optimizer" not in zero


def test_clipping_switched_off_is_said_to_deepspeed(workspace: Workspace) -> None:
    workspace.write_deepspeed(remove="gradient_clipping")
    config = resolve_deepspeed_config(recipe_of(workspace, "train.clip=0"), world_size=1, micro_batches=1)
    assert config["gradient_clipping"] == 0.0


def test_deepspeed_itself_accepts_the_resolved_configuration(workspace: Workspace) -> None:
    config = resolve_deepspeed_config(recipe_of(workspace), world_size=1, micro_batches=3)
    read = deepspeed_config.DeepSpeedConfig(config)
    assert (read.train_batch_size, read.gradient_clipping, read.zero_optimization_stage) == (3, 1.0, 3)
    assert DEEPSPEED["gradient_clipping"] == "auto"
