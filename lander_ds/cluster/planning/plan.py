"""What fits on a cluster, and how long a step takes there, for every topology that the recipe's DeepSpeed JSONs allow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from lander_ds.cluster.planning.activations import Activations, trace
from lander_ds.cluster.planning.anatomy import Anatomy, anatomy
from lander_ds.cluster.planning.cluster import Cluster
from lander_ds.cluster.planning.memory import (
    GRADIENT_BYTES,
    RankMemory,
    Sharding,
    checkpoint_bytes,
    rank_memory,
)
from lander_ds.cluster.planning.work import Operations, Traffic, operations, traffic
from lander_ds.cluster.planning.workload import Workload, micro_batch
from lander_ds.common.errors import ConfigError
from lander_ds.config.deepspeed_json import check_deepspeed_json, resolve_deepspeed_config
from lander_ds.config.deepspeed_topology import ZERO_STAGE, uses_hpz
from lander_ds.config.recipe import FrozenShards, Recipe, Topology
from lander_ds.models.span import Span

GB = 1e9
NAMES: dict[str, Topology] = {
    "replicated": "replicated",
    "zero3": "zero3",
    "zero3_offload": "zero3",
    "pipeline": "pipeline",
    "pipeline_zero3": "pipeline_zero3",
}
"""JSONs that are looked for beside the recipe's -> topology."""
ADAM_BYTES = 28
"""What one parameter's AdamW step reads and writes: gradient, master, two moments; the last three twice."""
CLOSE = 1.05
"""Plans that take at most so much longer than the fastest are as fast as it, as far as an estimate can tell."""


@dataclass(frozen=True)
class StagePlan:
    """One pipeline stage, or the whole model; every data-parallel rank of it is alike."""

    layers: tuple[int, int]
    """First decoder layer, and the one after the last."""
    memory: RankMemory
    operations: Operations
    """Per micro-batch."""
    traffic: Traffic
    sends: float
    """Bytes of activations and their gradients that go to the next stage and come back, per micro-batch."""
    seconds: float
    """Per micro-batch."""


@dataclass(frozen=True)
class Plan:
    """One way to run the recipe."""

    name: str
    """Of the DeepSpeed JSON, without .json."""
    topology: Topology
    frozen_shards: FrozenShards
    stages: int
    data_ranks: int
    micro_batches: int
    """Per data-parallel rank and step."""
    tokens: int
    """Of a micro-batch."""
    parts: tuple[StagePlan, ...]
    checkpoint: int
    """Bytes on disk."""
    step_seconds: float
    bubble: float
    """(S - 1) / (M + S - 1): share of the time that a stage of an even pipeline waits."""
    fits: bool
    short_of: str
    """What it does not fit into; empty when it fits."""

    @property
    def label(self) -> str:
        """Its JSON, and whether frozen weights are sharded inside a node."""
        return self.name if self.frozen_shards == "world" else f"{self.name} (node)"

    @property
    def ranks(self) -> int:
        """GPUs."""
        return self.stages * self.data_ranks

    @property
    def device_bytes(self) -> int:
        """Bytes on the fullest GPU, without what the cluster description reserves."""
        return max(part.memory.on_device for part in self.parts)

    @property
    def gathered_bytes(self) -> float:
        """Bytes of frozen and trained weights that a rank receives in a step, from others and from the host."""
        return self.micro_batches * sum(part.traffic.gathers + part.traffic.over_bus for part in self.parts)

    def as_json(self) -> dict[str, Any]:
        """Everything, for programs."""
        plain = {name: value for name, value in vars(self).items() if name != "parts"}
        parts = []
        for part in self.parts:
            figures = asdict(part)
            parts.append({"held": figures.pop("memory"), **figures, "on_device": part.memory.on_device})
        return {**plain, "ranks": self.ranks, "device_bytes": self.device_bytes, "parts": parts}


class Planner:
    """Plans of one recipe; the model is built once, its activations are traced once per size of micro-batch."""

    def __init__(self, recipe: Recipe, workload: Workload) -> None:
        """Build the model on meta.

        Raises:
            ModelError, ArtefactError, ConfigError: see `anatomy`.
        """
        self.recipe, self.workload = recipe, workload
        self.model: Anatomy = anatomy(recipe)
        self.checkpoint = checkpoint_bytes(self.model)
        self._trace = cache(lambda batch, sharded: trace(recipe, batch, sharded, fused=True))

    def plans(self, cluster: Cluster) -> list[Plan]:
        """Every way to use all GPUs of the cluster: JSONs beside the recipe's, frozen weights sharded over all nodes and
        inside one, and every number of stages.

        Raises:
            ConfigError: a JSON is wrong; or there is no way at all.
        """
        plans = [
            self.plan(cluster, recipe, name, stages)
            for name, recipe in self._recipes(cluster)
            for stages in self._stage_counts(recipe, cluster.nodes * cluster.gpus_per_node)
        ]
        if not plans:
            raise ConfigError(
                f"topology: {self.recipe.topology} cannot use {cluster.nodes * cluster.gpus_per_node} GPUs: set "
                "topology: zero3, or change the cluster description"
            )
        return plans

    def _recipes(self, cluster: Cluster) -> Iterator[tuple[str, Recipe]]:
        for name, recipe in self._of_jsons().items():
            yield name, recipe
            zero = check_deepspeed_json(recipe).get("zero_optimization") or {}
            if cluster.nodes > 1 and ZERO_STAGE[recipe.topology] == 3 and not uses_hpz(zero):
                yield name, replace(recipe, frozen_shards="node")

    def _of_jsons(self) -> Mapping[str, Recipe]:
        own = Path(self.recipe.deepspeed)
        recipes = {own.stem: replace(self.recipe, frozen_shards="world")}
        for name, topology in NAMES.items():
            beside = own.with_name(f"{name}.json")
            own_of_name = replace(
                self.recipe, topology=topology, frozen_shards="world", deepspeed=str(beside)
            )
            if beside.exists() and name not in recipes and self._is_possible(own_of_name):
                recipes[name] = own_of_name
        return recipes

    def _is_possible(self, recipe: Recipe) -> bool:
        """Pipelines refuse float16, and tied embeddings that are trained; ZeRO-3 refuses quantised weights."""
        if recipe.model.quantize is not None and recipe.sharded:
            return False
        tied = self.model.model.config.tie_word_embeddings and self.recipe.train.method == "full"
        return not recipe.pipelined or (self.recipe.model.dtype != "float16" and not tied)

    def _stage_counts(self, recipe: Recipe, ranks: int) -> Iterator[int]:
        if not recipe.pipelined:
            yield 1
            return
        for stages in range(2, min(ranks, self.model.layers) + 1):
            if ranks % stages == 0:
                yield stages

    def plan(self, cluster: Cluster, recipe: Recipe, name: str, stages: int) -> Plan:
        """One plan.

        Args:
            cluster: the machines.
            recipe: with topology and DeepSpeed JSON.
            name: for the table.
            stages: pipeline stages.
        """
        model = self.model
        ranks = [cluster.gpus_per_node] * cluster.nodes
        data_ranks = sum(ranks) // stages
        links = Links(cluster, stages, data_ranks)
        batch, count = micro_batch(recipe, self.workload, data_ranks)
        sharding = sharding_of(recipe, stages, ranks, count)
        overlap = bool(sharding.zero.overlap_comm)
        kept = self._trace(batch, sharding.sharded)
        parts = []
        for stage, span in enumerate(model.stage_spans(stages)):
            memory = rank_memory(
                model, span, sharding, batch.targets, self._activations(kept, span, stages, stage, count)
            )
            work, wire = operations(model, span, batch), traffic(model, span, sharding)
            sends = 0.0
            if not span.last:
                sends = kept.hidden * (1.0 + (model.first_trained < span.stop))
            seconds = links.micro_batch_seconds(work, wire, sends, overlap)
            parts.append(StagePlan((span.start, span.stop), memory, work, wire, sends, seconds))
        step = links.step_seconds(parts, count, overlap)
        short = _short_of(cluster, parts)
        bubble = (stages - 1) / (count + stages - 1)
        return Plan(
            name,
            recipe.topology,
            recipe.frozen_shards,
            stages,
            data_ranks,
            count,
            batch.tokens,
            tuple(parts),
            self.checkpoint,
            step,
            bubble,
            not short,
            short,
        )

    def _activations(self, kept: Activations, span: Span, stages: int, stage: int, count: int) -> int:
        """Of all micro-batches that are under way in a stage: 1F1B starts S - s before the first one comes back."""
        first, recompute = self.model.first_trained, self.recipe.train.activation_checkpointing
        in_flight = min(stages - stage, count)
        each = kept.kept(span.start, span.stop, span.last, first, recompute)
        again = kept.largest(span.start, span.stop) if recompute and span.stop > first else 0
        received = 0 if span.first else kept.hidden
        return in_flight * (each + received) + again


def sharding_of(recipe: Recipe, stages: int, ranks: Sequence[int], micro_batches: int) -> Sharding:
    """How DeepSpeed will hold a span, by the recipe's resolved JSON.

    Args:
        recipe: with topology and DeepSpeed JSON.
        stages: pipeline stages.
        ranks: of every node.
        micro_batches: per data-parallel rank and step.

    Raises:
        ConfigError: the JSON is wrong.
    """
    data_ranks = max(1, sum(ranks) // stages)
    config = resolve_deepspeed_config(replace(recipe, pipeline_stages=stages), data_ranks, micro_batches)
    zero = DeepSpeedZeroConfig(**config["zero_optimization"])
    frozen_ranks = _fewest_of_a_node(ranks, data_ranks) if recipe.frozen_shards == "node" else data_ranks
    item = GRADIENT_BYTES[config["data_types"]["grad_accum_dtype"]]
    return Sharding(zero, data_ranks, frozen_ranks, item, stages > 1)


def _fewest_of_a_node(ranks: Sequence[int], data_ranks: int) -> int:
    """The fewest ranks of one pipeline stage that are on one node; those of a stage, and of a node, lie side by side."""
    nodes = [node for node, count in enumerate(ranks) for _ in range(count)]
    return min(Counter((rank // data_ranks, node) for rank, node in enumerate(nodes)).values())


@dataclass(frozen=True)
class Links:
    """Seconds on a cluster whose ranks form a grid of stages and data-parallel ranks (those of a stage side by side)."""

    cluster: Cluster
    stages: int
    data_ranks: int

    def micro_batch_seconds(self, work: Operations, wire: Traffic, sends: float, overlap: bool) -> float:
        """One micro-batch in one stage: computing, weights, gradients (ZeRO-3), sending on."""
        cluster = self.cluster
        computing = self._computing(work.total)
        gathering = (
            self._collective(wire.gathers - wire.inside)
            + self._inside(wire.inside)
            + wire.collectives * cluster.latency * 1e-6
        )
        if wire.collectives or wire.over_bus:
            gathering += self._collective(wire.reductions)
        gathering += wire.over_bus / (cluster.host_bandwidth * GB)
        together = max(computing, gathering) if overlap else computing + gathering
        return together + self._between_stages(sends)

    def _computing(self, work: float) -> float:
        return work / (self.cluster.tflops * 1e12 * self.cluster.efficiency)

    def step_seconds(self, parts: Sequence[StagePlan], micro_batches: int, overlap: bool) -> float:
        """A step: the slowest stage works without a pause; before and after it the others fill and drain."""
        slowest = max(part.seconds for part in parts)
        working = sum(part.seconds for part in parts) + (micro_batches - 1) * slowest
        return working + max(self._after(part, overlap) for part in parts)

    def _after(self, part: StagePlan, overlap: bool) -> float:
        """Reduction under ZeRO-1, where it is not hidden behind the last micro-batch's backward pass; updated weights;
        and the optimizer where it works on the host."""
        wire, bus = part.traffic, self.cluster.host_bandwidth * GB
        reducing = 0.0
        if not wire.collectives:
            hidden = self._computing(part.operations.backward + part.operations.recompute) if overlap else 0.0
            reducing = max(0.0, self._collective(wire.reductions) - hidden) + self._collective(wire.updates)
        updating = 0.0
        if wire.over_bus_step:
            updating = (wire.over_bus_step + ADAM_BYTES / 12 * part.memory.optimizer) / bus
        return reducing + updating

    def _collective(self, received: float) -> float:
        """A ring over the data-parallel ranks of a stage, each of which receives so many bytes."""
        if self.data_ranks == 1:
            return 0.0
        cluster, speed = self.cluster, self.cluster.bandwidth_efficiency * GB
        inside = self._inside(received)
        per_node = min(self.data_ranks, cluster.gpus_per_node)
        if self.data_ranks <= cluster.gpus_per_node and cluster.gpus_per_node % self.data_ranks == 0:
            return inside
        # One ring enters and leaves each machine once; the rings of several stages share its cards.
        rings = cluster.gpus_per_node / per_node
        return max(inside, received * rings / (cluster.inter_bandwidth * speed))

    def _inside(self, received: float) -> float:
        """A ring over ranks of one machine."""
        return received / (self.cluster.intra_bandwidth * self.cluster.bandwidth_efficiency * GB)

    def _between_stages(self, sends: float) -> float:
        """Point to point to the rank of the next stage, which is `data_ranks` further."""
        cluster, speed = self.cluster, self.cluster.bandwidth_efficiency * GB
        if sends == 0.0:
            return 0.0
        if self.stages * self.data_ranks <= cluster.gpus_per_node:
            return sends / (cluster.intra_bandwidth * speed)
        # As many ranks of a machine send to another one at once as there are data-parallel ranks on it.
        senders = min(self.data_ranks, cluster.gpus_per_node)
        return sends * senders / (cluster.inter_bandwidth * speed)


def _short_of(cluster: Cluster, parts: Sequence[StagePlan]) -> str:
    limit = (cluster.gpu_memory - cluster.reserved_memory) * GB
    needed = max(part.memory.on_device for part in parts)
    if needed > limit:
        return f"GPU memory: {needed / GB:.1f} of {limit / GB:.1f} GB"
    on_host = max(part.memory.on_host for part in parts) * cluster.gpus_per_node
    if on_host > cluster.host_memory * GB:
        return f"host memory: {on_host / GB:.1f} of {cluster.host_memory:.1f} GB"
    return ""


def best(plans: Sequence[Plan]) -> Plan | None:
    """The fastest plan that fits; None when nothing fits.

    Among those that are about as fast: the one with fewer stages, then the one that moves fewer bytes of weights per
    step (their time was estimated as well hidden, which remains to be seen), then the faster, then the smaller.
    """
    fitting = [plan for plan in plans if plan.fits]
    fastest = min((plan.step_seconds for plan in fitting), default=0.0)
    close = [plan for plan in fitting if plan.step_seconds <= CLOSE * fastest]
    return min(
        close,
        key=lambda plan: (plan.stages, plan.gathered_bytes, plan.step_seconds, plan.device_bytes),
        default=None,
    )


def best_of_each(plans: Sequence[Plan]) -> list[Plan]:
    """Per JSON, and way to shard frozen weights, the fastest that fits, else the one that needs least memory; the fastest
    first."""
    chosen = []
    for label in dict.fromkeys(plan.label for plan in plans):
        own = [plan for plan in plans if plan.label == label]
        chosen.append(best(own) or min(own, key=lambda plan: plan.device_bytes))
    return sorted(chosen, key=lambda plan: (not plan.fits, plan.step_seconds))


def over_nodes(planner: Planner, cluster: Cluster, largest: int) -> dict[int, list[Plan]]:
    """The best plan of each JSON for 1, 2, 4, ... machines up to `largest`, and for the cluster's own number."""
    counts = {1 << power for power in range(largest.bit_length()) if 1 << power <= largest} | {cluster.nodes}
    return {nodes: best_of_each(planner.plans(replace(cluster, nodes=nodes))) for nodes in sorted(counts)}
