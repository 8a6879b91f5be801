"""What each topology asks of `zero_optimization` in the DeepSpeed JSON."""

from __future__ import annotations

from typing import Any

from lander_ds.config.document import Problems, lookup
from lander_ds.config.recipe import Recipe, Topology

ZERO_STAGE: dict[Topology, int] = {"zero3": 3, "replicated": 1, "pipeline": 1, "pipeline_zero3": 3}
"""ZeRO stage of each topology."""

BUCKET_ELEMENTS = 16_777_216
"""Gradients that are reduced at one time: 32 MiB in bfloat16 are enough for full bandwidth."""

NO_LEAVES: dict[str, Any] = {"leaf_module": {"classes": []}}
"""DeepSpeed would gather whole mixtures of experts at once, and takes their weights away too early below the lowest layer
whose input needs a gradient."""

_LOOKAHEAD = {
    "stage3_prefetch_bucket_size": "prefetch_bucket_size",
    "stage3_max_reuse_distance": "max_reuse_distance",
}
"""Keys by which DeepSpeed looks ahead in its record of modules -> their second names."""

_INTERLEAVED = (
    "forward and backward passes of different micro-batches take turns in a pipeline, so the order of modules "
    "that DeepSpeed records does not repeat"
)


def check_zero(zero: dict[str, Any], recipe: Recipe, problems: Problems) -> None:
    """Record what in `zero_optimization` contradicts the recipe's topology or cannot work with it."""
    topology = recipe.topology

    def refuse(reason: str, *path: str) -> None:
        problems.add(("zero_optimization", *path), f"topology: {topology}: {reason}")

    stage, wanted = zero.get("stage") or 0, ZERO_STAGE[topology]
    if stage != wanted:
        problems.add(
            ("zero_optimization", "stage"),
            f"the recipe says topology: {topology}, which needs {wanted}, found {stage}; write {wanted}",
        )
        return
    if topology in ("pipeline", "pipeline_zero3") and zero.get("overlap_comm") is True:
        refuse("DeepSpeed does not overlap communication in pipelines; write false", "overlap_comm")
    if stage == 1:
        sharding = "zero3" if topology == "replicated" else "pipeline_zero3"
        if lookup(zero, ("offload_param", "device")) not in (None, "none"):
            refuse(
                f"only ZeRO stage 3 offloads weights; remove it, or set topology: {sharding} in the recipe",
                "offload_param",
            )
        if lookup(zero, ("offload_optimizer", "device")) == "nvme":
            refuse(
                f"ZeRO stage 1 offloads to the host alone; write cpu, or set topology: {sharding} in the recipe",
                "offload_optimizer",
                "device",
            )
        if zero.get("compute_grad_norm") is False:
            refuse("the gradient norm is clipped by and logged; remove it", "compute_grad_norm")
    if uses_hpz(zero) and recipe.frozen_shards == "node":
        refuse(
            "frozen_shards: node shards frozen weights inside a node already, and hpZ would keep a second set of shards; "
            "write 1 or remove it",
            "zero_hpz_partition_size",
        )
    if topology != "pipeline_zero3":
        return
    for name in (*_LOOKAHEAD, *_LOOKAHEAD.values()):
        if zero.get(name) not in (None, "auto", 0):
            refuse(f"{_INTERLEAVED}; write 0 or remove it", name)
    for name in ("stage3_allgather_sequential", "allgather_sequential"):
        if zero.get(name) is True:
            refuse(f"it makes DeepSpeed prefetch, but {_INTERLEAVED}; remove it", name)
    if uses_hpz(zero) and recipe.frozen_shards == "world":
        refuse(
            "weights are sharded once, over the ranks of a stage; write 1 or remove it (frozen_shards: node in the recipe "
            "shards frozen ones inside a node)",
            "zero_hpz_partition_size",
        )


def uses_hpz(zero: dict[str, Any]) -> bool:
    """Whether DeepSpeed keeps a second set of shards inside a node (hpZ)."""
    return zero.get("zero_hpz_partition_size") not in (None, "auto", 0, 1)


def complete_zero(zero: dict[str, Any], topology: Topology) -> None:
    """Write out what the topology fixes, where DeepSpeed's default would be another."""
    # DeepSpeed would hold a buffer of 500 million elements, for gradients that are few here.
    zero.setdefault("reduce_bucket_size", BUCKET_ELEMENTS)
    if ZERO_STAGE[topology] == 3:
        zero.update({**NO_LEAVES, **zero})
    if topology == "pipeline_zero3":
        for name, second in _LOOKAHEAD.items():
            zero.pop(second, None)
            zero[name] = 0
        zero["overlap_comm"] = False
