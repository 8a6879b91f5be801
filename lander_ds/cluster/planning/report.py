"""Plans as tables and as a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from lander_ds.cluster.planning.cluster import Cluster
from lander_ds.cluster.planning.plan import GB, Plan, Planner, best
from lander_ds.common.files import writing


def memory_table(plans: Sequence[Plan], cluster: Cluster) -> Table:
    """Where the memory of the fullest GPU goes, in GB, one row per plan."""
    table = _table(
        f"GB on the fullest of {cluster.nodes} x {cluster.gpus_per_node} GPUs of {cluster.gpu_memory:g} GB"
    )
    for heading in ("weights", "optim.", "grad.", "activ.", "buffers", "total", "host", "fits"):
        table.add_column(heading, justify="right")
    for plan in plans:
        part = max(plan.parts, key=lambda part: part.memory.on_device).memory
        buffers = part.persistent + part.gathered + part.bucket + part.loss
        sizes = (
            part.weights,
            part.optimizer,
            part.gradients,
            part.activations,
            buffers,
            part.on_device,
            part.on_host,
        )
        fits = "yes" if plan.fits else "no"
        table.add_row(plan.label, _grid(plan), *(f"{size / GB:.1f}" for size in sizes), fits)
    return table


def speed_table(plans: Sequence[Plan]) -> Table:
    """How long a step takes, and what slows it down, one row per plan."""
    table = _table(
        "expected speed; * is recommended: the fastest that fits, or the simplest of those within 5 % of it"
    )
    for heading in ("micro-batches", "bubble", "balance", "s / step", "tokens / s"):
        table.add_column(heading, justify="right")
    fastest = best(plans)
    for plan in plans:
        seconds = [part.seconds for part in plan.parts]
        staged = plan.stages > 1
        table.add_row(
            plan.label + (" *" if plan is fastest else ""),
            _grid(plan),
            str(plan.micro_batches),
            f"{100 * plan.bubble:.0f} %" if staged else "-",
            f"{100 * sum(seconds) / (len(seconds) * max(seconds)):.0f} %" if staged else "-",
            f"{plan.step_seconds:.3g}",
            f"{_tokens_per_second(plan):,.0f}",
        )
    return table


def _table(title: str) -> Table:
    table = Table(title=title)
    table.add_column("DeepSpeed JSON", no_wrap=True)
    table.add_column("grid", no_wrap=True)
    return table


def _grid(plan: Plan) -> str:
    return f"{plan.stages}x{plan.data_ranks}"


def _tokens_per_second(plan: Plan) -> float:
    return plan.tokens * plan.micro_batches * plan.data_ranks / plan.step_seconds


def model_lines(planner: Planner, plans: Sequence[Plan]) -> list[str]:
    """What the figures rest on, one fact a line."""
    model, plan = planner.model, plans[0]
    tensors = model.tensors(model.whole)
    total = sum(tensor.elements for tensor in tensors)
    trained = sum(tensor.elements for tensor in tensors if tensor.trained)
    forward = sum(part.operations.forward for part in plan.parts)
    everything = sum(part.operations.total for part in plan.parts)
    steps = plan.micro_batches * plan.data_ranks
    lines = [
        *(f"{p.label} {_grid(p)} does not fit into {p.short_of}" for p in plans if not p.fits),
        f"{total:,} parameters, {trained:,} trained ({100 * trained / total:.2f} %), lowest trained layer "
        f"{model.first_trained} of {model.layers}",
        f"checkpoint: {planner.checkpoint / GB:.2f} GB",
        f"{everything * steps / 1e12:.1f} TFLOP per step, {forward * steps / 1e12:.1f} of them forward",
    ]
    if model.estimated and model.selection is not None:
        layers = ", ".join(str(layer.layer) for layer in model.selection.layers)
        lines.append(
            f"no selection in {planner.recipe.run_dir} yet: layers {layers} and the bank sizes are estimated"
        )
    return lines


def save_plot(plans_by_nodes: Mapping[int, Sequence[Plan]], cluster: Cluster, path: Path) -> None:
    """Tokens per second and bytes on the fullest GPU over the number of machines, one line per DeepSpeed JSON."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    speed, memory = figure.subplots(1, 2)
    labels = dict.fromkeys(plan.label for plans in plans_by_nodes.values() for plan in plans)
    for label in labels:
        own = [
            (nodes, plan) for nodes, plans in plans_by_nodes.items() for plan in plans if plan.label == label
        ]
        fitting = [(nodes, plan) for nodes, plan in own if plan.fits]
        tokens = [_tokens_per_second(plan) for _, plan in fitting]
        speed.plot([nodes for nodes, _ in fitting], tokens, marker="o", label=label)
        memory.plot(
            [nodes for nodes, _ in own], [p.device_bytes / GB for _, p in own], marker="o", label=label
        )
    limit = cluster.gpu_memory - cluster.reserved_memory
    memory.axhline(limit, color="black", linestyle="--", label="there is")
    for axes, title in ((speed, "tokens per second (where it fits)"), (memory, "GB on the fullest GPU")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(plans_by_nodes), [str(nodes) for nodes in plans_by_nodes])
        axes.set_yscale("log")
        axes.set_xlabel(f"machines with {cluster.gpus_per_node} GPUs each")
        axes.set_title(title)
        axes.grid(alpha=0.3)
        axes.legend()
    with writing(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lstrip(".") or "png")
