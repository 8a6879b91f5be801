#!/usr/bin/env python
"""How much host memory do import and export of a model take? Measured on a random Llama, one process per measurement.

    python benchmarks/memory.py --json                       a model of 1 B parameters in bfloat16 (5 GB of disk)
    python benchmarks/memory.py --parameters 100e6 --json

A random model is written in shards to a temporary directory, and a made-up checkpoint with four trained layers. Then a
fresh process fills a model from the files (one rank: everything, and the first quarter of the layers), or writes an
export, while a thread looks at the process's anonymous memory (RssAnon). Pages of mapped files do not count: the
system takes them back whenever it needs them. What is bounded is the growth beyond what the rank keeps.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MIB = 1 << 20
SAMPLE_SECONDS = 0.002
PAIRS = ("en-de", "en-fr", "en-ru", "en-cs")
TRAINED_LAYERS = 4
SHARD_BYTES = 10**9
VOCABULARY = 32_000
IMPORTS, EXPORTS = (
    ("import", "import-quarter"),
    ("dense", "routed", "delta", "dense-en-de", "apply", "revert"),
)
SLACK = 64 * MIB
"""For the interpreter, names, configurations and threads: what does not grow with tensors."""
UNITS_OF_IMPORT, TENSORS_OF_EXPORT = 1, 6
"""An import may need one unit (embedding, layer, head) beyond what it keeps; an export six times the largest tensor: it
is merged in float32 (twice bfloat16) and rounded, cut into banks, and compared bit by bit."""


@dataclass(frozen=True)
class Measured:
    """What one process needed."""

    peak_bytes: int
    """Largest growth of anonymous memory."""
    kept_bytes: int
    """Of these, parameters that the rank keeps."""
    seconds: float


class Sampler:
    """The largest growth of this process's anonymous memory while it is open."""

    def __enter__(self) -> Sampler:
        self.first = self.peak = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous_bytes())

    @property
    def growth(self) -> int:
        """In bytes."""
        return self.peak - self.first


def anonymous_bytes() -> int:
    """RssAnon of this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("this kernel does not tell RssAnon (Linux 4.5 or newer does)")


def sizes(parameters: float) -> dict[str, int]:
    """Width, layers and FFN of a Llama with about so many parameters."""
    width = max(64, 64 * round(2048 / 64 * (parameters / 1e9) ** (1 / 3)))
    embeddings = 2 * VOCABULARY * width
    layers = max(2 * TRAINED_LAYERS, round((parameters - embeddings) / (16 * width * width)))
    return {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 4 * width}


def write_model(directory: Path, parameters: float) -> None:
    """A random bfloat16 model in shards, one tensor at a time."""
    import torch
    from transformers import LlamaConfig

    from lander_ds.config.recipe import ModelConfig
    from lander_ds.export.stream import Spec
    from lander_ds.export.writer import write_weights
    from lander_ds.models.loading import build

    shape = sizes(parameters)
    heads = shape["hidden_size"] // 64
    config = LlamaConfig(
        **shape, vocab_size=VOCABULARY, num_attention_heads=heads, num_key_value_heads=heads, dtype="bfloat16"
    )
    config.save_pretrained(directory)
    model, _ = build(ModelConfig(str(directory)), attention=None)
    specs = {name: Spec.like(parameter) for name, parameter in model.named_parameters()}

    def tensor_of(name: str) -> torch.Tensor:
        spec = specs[name]
        return torch.empty(spec.shape, dtype=spec.dtype).uniform_(-0.05, 0.05)

    write_weights(directory, specs, tensor_of, SHARD_BYTES, "write model")


def recipe_of(work: Path) -> Any:
    """A recipe of which only model and run directory matter."""
    from lander_ds.config.recipe import ModelConfig, Recipe
    from lander_ds.config.schema.data import DataConfig

    return Recipe(str(work / "run"), ModelConfig(str(work / "model")), DataConfig(PAIRS, ()), "unused")


def write_checkpoint(work: Path) -> None:
    """A checkpoint with random values in the banks of the last layers, and a line of gate values."""
    import torch

    from lander_ds.checkpoint.identity import identity_of
    from lander_ds.checkpoint.retention import Retention
    from lander_ds.checkpoint.writer import Parts, Writer
    from lander_ds.common.run_directory import RunDirectory
    from lander_ds.method.selection import Bank, LayerSelection, Selection
    from lander_ds.models.loading import build
    from lander_ds.models.parameter_groups import mark_trained, prepare_model
    from lander_ds.models.weights import base_fingerprint

    recipe, run = recipe_of(work), RunDirectory(work / "run")
    model, family = build(recipe.model, attention=None)
    neurons, count = family.neurons(model), len(family.layers_of(model))
    size = neurons // 40
    banks = (
        Bank("general", PAIRS, neurons - size * (len(PAIRS) + 1)),
        *(Bank("specific", (pair,), size) for pair in PAIRS),
        Bank("frozen", (), size),
    )
    layers = range(count - TRAINED_LAYERS, count)
    metadata = {"base_fingerprint": base_fingerprint(work / "model")}
    selection = Selection(
        PAIRS, neurons, tuple(LayerSelection(n, torch.randperm(neurons), banks) for n in layers), metadata
    )
    run.path.mkdir()
    selection.save(run.selection)
    prepare_model(model, family, recipe, selection)
    mark_trained(model, family, recipe.train, selection)
    tensors = {
        name: torch.empty(parameter.shape).uniform_(-0.05, 0.05)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    writer = Writer(run.checkpoints, Retention(), background=False)
    description = identity_of(recipe, {"base": metadata["base_fingerprint"], "data": "none"})
    writer.save(1, Parts(tensors, {}), description, run.selection)
    writer.finish()
    gates = {str(layer): dict.fromkeys(PAIRS, 0.6) for layer in layers}
    run.metrics.write_text(json.dumps({"step": 1, "gates": gates}) + "\n", encoding="utf-8")


def measure_import(work: Path, part: float) -> Measured:
    """Fill a model from its files, as a rank does that holds so much of the layers."""
    from torch import nn

    from lander_ds.models.loading import build, fill
    from lander_ds.models.span import Span
    from lander_ds.models.weights import BaseWeights

    kept = 0

    def placement(unit: nn.Module) -> None:
        """Memory of its own for every parameter, as a device or a ZeRO-3 partition gives it."""
        nonlocal kept
        for parameter in unit.parameters():
            parameter.data = parameter.data.clone()
            kept += parameter.numel() * parameter.element_size()

    model, family = build(recipe_of(work).model)
    layers = len(family.layers_of(model))
    span = Span(0, max(1, round(part * layers)), layers)
    began = time.monotonic()
    with Sampler() as sampler:
        fill(model, family, BaseWeights(work / "model"), placement, span=span)
    return Measured(sampler.growth, kept, time.monotonic() - began)


def measure_export(work: Path, name: str) -> Measured:
    """Write one export."""
    from lander_ds.checkpoint import checkpoint
    from lander_ds.common.run_directory import RunDirectory
    from lander_ds.distributed.start import Start
    from lander_ds.export.delta_apply import Options, apply_delta, revert_delta
    from lander_ds.export.delta_write import export_delta
    from lander_ds.export.dense import export_dense
    from lander_ds.export.fold import folded, mean_gates
    from lander_ds.export.routed import export_routed
    from lander_ds.export.trained import TrainedModel
    from lander_ds.export.writer import Form

    recipe, run, out = recipe_of(work), RunDirectory(work / "run"), work / name
    means = mean_gates(checkpoint.newest(run.checkpoints).state, run.metrics)
    facts = {"base": {"name": "random", "fingerprint": "none"}, "method": "lander"}

    def opened() -> TrainedModel:
        return TrainedModel.open(Start(recipe, run), checkpoint.newest(run.checkpoints))

    calls: dict[str, Callable[[], None]] = {
        "dense": lambda: export_dense(opened().source, out, Form()),
        "dense-en-de": lambda: export_dense(folded(opened(), means, "en-de"), out, Form()),
        "routed": lambda: export_routed(opened(), out, Form()),
        "delta": lambda: export_delta(opened(), out, means, facts),
        "apply": lambda: apply_delta(work / "model", work / "delta", out, Options(), force=False),
        "revert": lambda: revert_delta(work / "apply", work / "delta", out, force=False),
    }
    began = time.monotonic()
    with Sampler() as sampler:
        calls[name]()
    return Measured(sampler.growth, 0, time.monotonic() - began)


def in_a_process(work: Path, name: str) -> Measured:
    """One measurement in a fresh process."""
    command = [sys.executable, __file__, "--measure", name, "--work", str(work)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"memory.py: measuring {name} failed (exit code {done.returncode})")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def result(work: Path, wanted: list[str]) -> dict[str, Any]:
    """The wanted cases, measured, with their bounds."""
    from lander_ds.config.recipe import ModelConfig
    from lander_ds.models.loading import build
    from lander_ds.models.span import units, whole
    from lander_ds.models.weights import BaseWeights

    weights = BaseWeights(work / "model")
    tensors = {name: weights.read(name) for name in weights.names()}
    sizes_on_disk = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    model, family = build(ModelConfig(str(work / "model")))
    largest_unit = max(
        sum(p.numel() * p.element_size() for p in unit.parameters())
        for _, unit in units(model, family, whole(model, family))
    )
    largest = max(sizes_on_disk.values())
    bounds = {
        **dict.fromkeys(IMPORTS, UNITS_OF_IMPORT * largest_unit + SLACK),
        **dict.fromkeys(EXPORTS, TENSORS_OF_EXPORT * largest + SLACK),
    }
    cases = {}
    for name in wanted:
        bound = bounds[name]
        measured = in_a_process(work, name)
        growth = measured.peak_bytes - measured.kept_bytes
        cases[name] = {
            **asdict(measured),
            "beyond_kept_bytes": growth,
            "bound_bytes": bound,
            "bounded": growth <= bound,
        }
    return {
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "model_bytes": sum(sizes_on_disk.values()),
        "largest_tensor_bytes": largest,
        "largest_unit_bytes": largest_unit,
        "cases": cases,
        "bounded": all(case["bounded"] for case in cases.values()),
    }


def main() -> int:
    """Make the model, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", type=float, default=1e9, help="about how many; default 1e9")
    parser.add_argument(
        "--directory", type=Path, help="where the temporary directory is made; default: the system's"
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        default=[*IMPORTS, *EXPORTS],
        choices=(*IMPORTS, *EXPORTS),
        help="default: all; revert needs apply, which needs delta",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--measure", choices=(*IMPORTS, *EXPORTS), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure in IMPORTS:
        print(
            json.dumps(asdict(measure_import(arguments.work, 1.0 if arguments.measure == "import" else 0.25)))
        )
        return 0
    if arguments.measure:
        print(json.dumps(asdict(measure_export(arguments.work, arguments.measure))))
        return 0
    with tempfile.TemporaryDirectory(prefix="lander-memory-", dir=arguments.directory) as directory:
        work = Path(directory)
        write_model(work / "model", arguments.parameters)
        write_checkpoint(work)
        actual = result(work, arguments.cases)
    if arguments.json:
        print(json.dumps(actual, indent=2))
    else:
        print(f"{actual['parameters']:,} parameters, {actual['model_bytes'] / MIB:,.0f} MiB")
        for name, case in actual["cases"].items():
            figures = (
                case[key] / MIB for key in ("peak_bytes", "kept_bytes", "beyond_kept_bytes", "bound_bytes")
            )
            peak, kept, growth, bound = figures
            print(
                f"{name:15} peak {peak:8.0f} MiB, kept {kept:6.0f}, beyond it {growth:6.0f} of at most {bound:6.0f}"
            )
    return 0 if actual["bounded"] else 1


if __name__ == "__main__":
    sys.exit(main())
