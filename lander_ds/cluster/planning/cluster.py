"""The cluster description: what a plan must know of the machines. YAML, as strict as a recipe."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from pydantic.dataclasses import dataclass

from lander_ds.common.errors import ConfigError
from lander_ds.config.document import Problems, describe, read_text
from lander_ds.config.strict import STRICT, build
from lander_ds.config.yaml_source import parse_yaml

EXAMPLE = "examples/clusters/8xa100-80g.yaml"


@dataclass(frozen=True, config=STRICT)
class Cluster:
    """Machines that are all alike. GB are 10^9 bytes."""

    nodes: int
    """Machines."""
    gpus_per_node: int
    """GPUs of one machine; one rank runs on each."""
    gpu_memory: float
    """Memory of one GPU in GB."""
    host_memory: float
    """Main memory of one machine in GB."""
    tflops: float
    """Peak of one GPU in the type of the weights, dense, in 10^12 operations per second (A100 in bfloat16: 312)."""
    intra_bandwidth: float
    """What one GPU can send to others of its machine, in GB/s, one direction (A100 with NVSwitch: 300)."""
    inter_bandwidth: float
    """What one machine can send to others, all its network cards together, in GB/s, one direction."""
    efficiency: float = 0.4
    """Share of the peak that large matrix products of this trainer reach; an assumption until it is measured."""
    bandwidth_efficiency: float = 0.7
    """Share of the bandwidths that collectives reach; an assumption until it is measured."""
    host_bandwidth: float = 25.0
    """Between one GPU and the host's memory in GB/s, one direction."""
    disk_bandwidth: float = 2.0
    """What checkpoints are written with, all machines together, in GB/s."""
    latency: float = 20.0
    """Of one collective in microseconds."""
    reserved_memory: float = 2.0
    """GB of a GPU that are not ours: CUDA context, NCCL, holes that the allocator leaves."""


def load_cluster(path: Path) -> Cluster:
    """The cluster that a YAML file describes.

    Raises:
        ConfigError: unreadable; unknown or missing keys, or values that are not positive (all at once, with lines).
    """
    document = parse_yaml(read_text(path, "the cluster description"), str(path))
    if not isinstance(document.value, dict):
        raise ConfigError(
            f"{path}: a cluster description is a mapping of keys, found {describe(document.value)}; {EXAMPLE} shows one"
        )
    cluster = build(Cluster, document)
    problems = Problems(document)
    for entry in fields(Cluster):
        value = getattr(cluster, entry.name)
        least = 0 if entry.name in ("latency", "reserved_memory") else None
        if value < 0 or (least is None and value == 0):
            problems.add(
                (entry.name,), f"must be {'at least' if least == 0 else 'more than'} 0, found {value:g}"
            )
        elif entry.name.endswith("efficiency") and value > 1:
            problems.add((entry.name,), f"is a share of the peak, at most 1, found {value:g}")
    problems.refuse()
    return cluster
