"""Plans: what they know of topologies, selections, recomputation, offloading and machines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.planned import ROOT, recipe_of
from support.selections import random_selection
from support.tiny_models import save, tiny_model

from lander_ds.cluster.planning.anatomy import anatomy, estimated_selection
from lander_ds.cluster.planning.cluster import Cluster, load_cluster
from lander_ds.cluster.planning.plan import Plan, Planner, best, best_of_each, over_nodes, sharding_of
from lander_ds.cluster.planning.workload import Workload, micro_batch
from lander_ds.common.errors import ArtefactError
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.schema.method import BankChoice, LayerChoice, SelectConfig
from lander_ds.config.schema.types import Quantization
from lander_ds.distributed.balance import span_of
from lander_ds.distributed.engines.figures import bytes_of
from lander_ds.distributed.parallel_dims import ParallelDims
from lander_ds.models.loading import build, fill
from lander_ds.models.parameter_groups import mark_trained, prepare_model
from lander_ds.models.quantization import quantizing
from lander_ds.models.weights import BaseWeights

CLUSTER = Cluster(1, 2, 80, 500, 312, 300, 25)
WORKLOAD = Workload(example_tokens=12)


def plans_of(folder: Path, *overrides: str, cluster: Cluster = CLUSTER) -> dict[str, Plan]:
    planner = Planner(recipe_of(folder, "llama", *overrides), WORKLOAD)
    return {plan.label: plan for plan in best_of_each(planner.plans(cluster))}


def test_every_json_beside_the_recipes_is_planned(tmp_path: Path) -> None:
    plans = plans_of(tmp_path)
    assert set(plans) == {"replicated", "zero3", "zero3_offload", "pipeline", "pipeline_zero3"}
    assert all(plan.fits and plan.ranks == 2 for plan in plans.values())
    assert plans["zero3"].bubble == 0.0
    pipeline = plans["pipeline"]
    assert pipeline.bubble == 1 / (pipeline.micro_batches + 1)
    assert pipeline.parts[0].layers[0] == 0
    assert pipeline.parts[0].sends > 0 == pipeline.parts[-1].sends


def test_offloading_moves_bytes_to_the_host(tmp_path: Path) -> None:
    plans = plans_of(tmp_path)
    own, offloaded = plans["zero3"].parts[0].memory, plans["zero3_offload"].parts[0].memory
    assert own.on_host == 0
    assert offloaded.on_host == own.gradients + own.optimizer
    assert offloaded.on_device == own.on_device - offloaded.on_host
    assert plans["zero3_offload"].step_seconds > plans["zero3"].step_seconds


def everything_sharded(folder: Path) -> str:
    """JSONs under which ZeRO-3 keeps no parameter whole; returns the override of the recipe."""
    common = '"overlap_comm": true, "contiguous_gradients": true, "reduce_bucket_size": 1000'
    sharding = '"stage3_param_persistence_threshold": 0'
    (folder / "zero3.json").write_text(f'{{"zero_optimization": {{"stage": 3, {common}, {sharding}}}}}')
    (folder / "replicated.json").write_text(f'{{"zero_optimization": {{"stage": 1, {common}}}}}')
    return f"deepspeed={folder}/zero3.json"


def test_replicated_weights_are_whole_and_stay_where_they_are(tmp_path: Path) -> None:
    plans = plans_of(tmp_path, everything_sharded(tmp_path))
    whole, sharded = plans["replicated"].parts[0], plans["zero3"].parts[0]
    assert whole.memory.weights == pytest.approx(2 * sharded.memory.weights, rel=0.01)
    assert whole.memory.persistent == whole.memory.gathered == 0
    assert whole.memory.optimizer == pytest.approx(sharded.memory.optimizer, rel=0.01)
    assert plans["replicated"].gathered_bytes == 0.0 < plans["zero3"].gathered_bytes
    assert whole.operations == sharded.operations


@pytest.mark.parametrize("gpus", [1, 2])
def test_replicated_is_recommended_where_it_fits(tmp_path: Path, gpus: int) -> None:
    # Compute hides every byte, so that zero3 is not slower.
    cluster = replace(CLUSTER, gpus_per_node=gpus, tflops=1e-6, intra_bandwidth=1e6)
    plans = plans_of(tmp_path, everything_sharded(tmp_path), cluster=cluster)
    assert plans["zero3"].step_seconds <= plans["replicated"].step_seconds
    assert best(list(plans.values())) is plans["replicated"]
    unfit = replace(plans["replicated"], fits=False)
    assert best([unfit, plans["zero3"]]) is plans["zero3"]


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("method", ["lander", "lora"])
def test_a_quantised_base_is_counted_to_the_byte(tmp_path: Path, kind: Quantization, method: str) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    own = (f"deepspeed={ROOT}/ds_configs/7b/replicated.json", "topology=replicated", f"train.method={method}")
    recipe = recipe_of(tmp_path, "llama", *own, f"model.quantize={kind}", "select.banks.criterion=top")
    save(tiny_model("llama"), Path(recipe.model.path))
    planner = Planner(recipe, WORKLOAD)
    plans = {plan.name: plan for plan in planner.plans(CLUSTER)}
    assert set(plans) == {"replicated", "pipeline"}
    model, family = build(recipe.model)
    prepare_model(model, family, recipe, planner.model.selection)
    mark_trained(model, family, recipe.train, planner.model.selection)
    placement = quantizing(kind, family.layers_of(model), lambda unit: None)
    fill(model, family, BaseWeights(recipe.model.path), placement)
    held = plans["replicated"].parts[0].memory
    assert held.weights == bytes_of(model.parameters())
    assert held.gathered == 4 * 32 * 48, "the largest matrix is put together for a product"


def test_gradients_are_reduced_behind_the_backward_pass(tmp_path: Path) -> None:
    overlapped = '"overlap_comm": true, "contiguous_gradients": true, "reduce_bucket_size": 1000'
    seconds, buckets = [], []
    for name, extra in (("plain", overlapped.replace("true", "false", 1)), ("overlapped", overlapped)):
        (tmp_path / f"{name}.json").write_text(f'{{"zero_optimization": {{"stage": 1, {extra}}}}}')
        overrides = ("topology=replicated", f"deepspeed={tmp_path}/{name}.json")
        plan = plans_of(tmp_path, *overrides)[name]
        seconds.append(plan.step_seconds)
        buckets.append(plan.parts[0].memory.bucket)
    assert seconds[1] < seconds[0]
    assert buckets[1] - buckets[0] == 4 * 1000


def test_gradients_are_copied_before_zero3_scatters_them(tmp_path: Path) -> None:
    """Those that are together in the bucket, beside the buffer, if it is one, and the largest gradient on its way."""
    model = anatomy(recipe_of(tmp_path, "llama"))
    elements = [tensor.elements for tensor in model.tensors(model.whole) if tensor.trained]
    assert max(elements) < 2_000 < sum(elements)
    for size, contiguous, staged in (
        (10**6, "true", 10**6 + sum(elements)),
        (10**6, "false", sum(elements)),
        (2_000, "false", 2_000),
        (max(elements) - 1, "false", sum(one for one in elements if one < max(elements))),
    ):
        section = f'"stage": 3, "contiguous_gradients": {contiguous}, "reduce_bucket_size": {size}'
        (tmp_path / "own.json").write_text(f'{{"zero_optimization": {{{section}}}}}')
        plan = plans_of(tmp_path, f"deepspeed={tmp_path}/own.json")["own"]
        assert plan.parts[0].memory.bucket == 4 * (staged + max(elements))


def test_what_does_not_fit_says_why(tmp_path: Path) -> None:
    small = replace(CLUSTER, gpu_memory=2.0001)
    plans = plans_of(tmp_path, cluster=small)
    assert not any(plan.fits for plan in plans.values())
    assert best(list(plans.values())) is None
    assert plans["zero3"].short_of.startswith("GPU memory: ")
    little = replace(CLUSTER, host_memory=1e-9)
    assert plans_of(tmp_path, cluster=little)["zero3_offload"].short_of.startswith("host memory: ")


def test_recomputation_trades_memory_for_work(tmp_path: Path) -> None:
    usual = plans_of(tmp_path, "select.layers.criterion=all")["zero3"].parts[0]
    less = plans_of(tmp_path, "select.layers.criterion=all", "train.activation_checkpointing=true")[
        "zero3"
    ].parts[0]
    assert less.memory.activations < usual.memory.activations
    assert less.operations.total > usual.operations.total


def test_more_machines_hold_less_each(tmp_path: Path) -> None:
    planner = Planner(recipe_of(tmp_path, "llama"), WORKLOAD)
    actual = over_nodes(planner, CLUSTER, 4)
    assert list(actual) == [1, 2, 4]
    weights = [next(p for p in actual[n] if p.label == "zero3").parts[0].memory.weights for n in actual]
    assert weights[0] > weights[1] > weights[2]


def test_frozen_weights_sharded_inside_a_node(tmp_path: Path) -> None:
    cluster = replace(CLUSTER, nodes=2)
    plans = plans_of(tmp_path, everything_sharded(tmp_path), cluster=cluster)
    world, node = plans["zero3"], plans["zero3 (node)"]
    before, after = world.parts[0], node.parts[0]
    tensors = Planner(recipe_of(tmp_path, "llama"), WORKLOAD).model
    frozen = sum(t.elements for t in tensors.tensors(tensors.whole) if not t.trained)
    assert after.memory.weights - before.memory.weights == pytest.approx(
        4 * frozen * (1 / 2 - 1 / 4), rel=0.01
    )
    assert after.memory.optimizer == before.memory.optimizer
    assert (before.traffic.inside, after.traffic.reductions) == (0.0, before.traffic.reductions)
    # What is trained comes from all ranks.
    assert after.traffic.gathers - after.traffic.inside < 0.5 * before.traffic.gathers
    assert node.step_seconds < world.step_seconds
    assert best([world, node]) is node
    assert best([world, replace(node, fits=False)]) is world
    assert "zero3 (node)" not in plans_of(tmp_path, everything_sharded(tmp_path), "frozen_shards=node")


def test_a_node_counts_by_its_fewest_ranks(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "llama", "frozen_shards=node")
    for stages, ranks, expected in ((1, [2, 2], 2), (1, [3, 1], 1), (2, [2, 2], 2), (2, [4, 4, 4], 2)):
        assert sharding_of(recipe, stages, ranks, 1).frozen_ranks == expected


def test_a_slow_network_favours_pipelines(tmp_path: Path) -> None:
    slow = replace(CLUSTER, nodes=2, gpus_per_node=1, inter_bandwidth=1e-6, latency=0.0)
    # Everything is sharded.
    zero = '"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0'
    (tmp_path / "zero3.json").write_text(f'{{"zero_optimization": {{{zero}}}}}')
    (tmp_path / "pipeline.json").write_text('{"zero_optimization": {"stage": 1}}')
    overrides = (f"deepspeed={tmp_path}/zero3.json", "train.batch_tokens=960", "select.layers.criterion=last")
    plans = plans_of(tmp_path, *overrides, cluster=slow)
    assert plans["pipeline"].step_seconds < plans["zero3"].step_seconds


def test_float16_and_trained_tied_embeddings_are_not_cut(tmp_path: Path) -> None:
    uncut = {"replicated", "zero3", "zero3_offload"}
    assert set(plans_of(tmp_path, "model.dtype=float16")) == uncut
    planner = Planner(recipe_of(tmp_path, "llama-tied", "train.method=full"), WORKLOAD)
    assert {plan.topology for plan in planner.plans(CLUSTER)} == {"replicated", "zero3"}


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("cut", ["[]", "[1]"])
def test_stages_are_cut_as_training_cuts_them(tmp_path: Path, stages: int, cut: str) -> None:
    if stages == 3 and cut != "[]":
        pytest.skip("a cut of the recipe is for its own number of stages")
    overrides = ("topology=pipeline", f"pipeline_stages={stages}", f"pipeline_cut={cut}")
    recipe = recipe_of(tmp_path, "llama", *overrides)
    built = anatomy(recipe)
    model, family = build(recipe.model)
    prepare_model(model, family, recipe, built.selection)
    mark_trained(model, family, recipe.train, built.selection)
    real = [span_of(recipe, model, family, ParallelDims(stages, 1, rank)) for rank in range(stages)]
    assert list(built.stage_spans(stages)) == real


def test_the_selection_of_the_run_is_used(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "llama")
    assert anatomy(recipe).estimated
    random_selection(48, [2], recipe.data.pairs).save(RunDirectory(recipe.run_dir).selection)
    built = anatomy(recipe)
    assert (built.estimated, built.first_trained) == (False, 2)
    random_selection(40, [2], recipe.data.pairs).save(RunDirectory(recipe.run_dir).selection)
    with pytest.raises(ArtefactError, match="is for a model with 40 neurons"):
        anatomy(recipe)
    random_selection(48, [2]).save(RunDirectory(recipe.run_dir).selection)
    with pytest.raises(ArtefactError, match="is for pairs en-de, en-fr, de-en"):
        anatomy(recipe)


def test_estimated_selections_have_the_sizes_that_select_asks_for() -> None:
    select = SelectConfig(LayerChoice(k=2), BankChoice(rho=0.8, min_awareness=0.1))
    built = estimated_selection(select, ("en-de", "en-fr"), 10, 100)
    assert [layer.layer for layer in built.layers] == [0, 5]
    sizes = {(bank.kind, bank.owners): bank.size for bank in built.layers[0].banks}
    assert sizes == {
        ("general", ("en-de", "en-fr")): 72,
        ("specific", ("en-de",)): 9,
        ("specific", ("en-fr",)): 9,
        ("frozen", ()): 10,
    }
    assert torch.equal(built.layers[0].permutation.sort().values, torch.arange(100))
    top = SelectConfig(LayerChoice(k=2), BankChoice(criterion="top", share=0.1, owners="target"))
    banks = estimated_selection(top, ("en-de", "fr-de", "en-fr"), 10, 100).layers[0].banks
    assert [(bank.group.partition(":")[2], bank.size) for bank in banks] == [
        ("en-de+fr-de+en-fr", 5),
        ("en-fr", 5),
        ("en-de+fr-de", 5),
        ("", 85),
    ]
    for criterion, layers in (("last", [8, 9]), ("ends", [0, 9]), ("all", list(range(10)))):
        choice = SelectConfig(LayerChoice(criterion=criterion, k=2))  # type: ignore[arg-type]
        assert [layer.layer for layer in estimated_selection(choice, ("en-de",), 10, 20).layers] == layers
    per_pair = SelectConfig(LayerChoice(k=2, scope="per_pair"))
    assert len(estimated_selection(per_pair, ("en-de", "en-fr", "en-cs"), 10, 20).layers) == 6


def test_micro_batches_share_the_tokens_of_a_step(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "llama", "train.batch_tokens=100")
    for ranks in (1, 2, 3, 8):
        batch, count = micro_batch(recipe, WORKLOAD, ranks)
        assert batch.tokens <= 24
        assert sum(batch.lengths) == batch.tokens
        assert 100 <= batch.tokens * count * ranks < 100 + count * ranks


def test_a_model_of_70_billion_is_planned_without_weights(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=32000,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    ).save_pretrained(tmp_path / "70b")
    from lander_ds.config.loading import load_recipe

    own = [
        f"model.path={tmp_path}/70b",
        f"run_dir={tmp_path}/run",
        f"deepspeed={ROOT}/ds_configs/70b/zero3.json",
    ]
    recipe = load_recipe(ROOT / "recipes" / "70b.yaml", own)
    cluster = load_cluster(ROOT / "examples" / "clusters" / "8xa100-80g.yaml")
    planner = Planner(recipe, Workload())
    plan = planner.plan(cluster, recipe, "zero3", 1)
    part = plan.parts[0].memory
    assert part.weights == pytest.approx(138e9 / 8, rel=0.01)
    assert plan.fits
    assert 0.5 < plan.step_seconds / (6 * 69e9 * 131072 / 8 / (312e12 * 0.4)) < 1.5
