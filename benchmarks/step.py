#!/usr/bin/env python
"""How long does a training step take, and how much memory: this trainer against full fine-tuning and LoRA.

All systems run in one go on the same tokens, ranks and precision, and take turns step by step, so that whatever else
the machine does hits all of them alike. docs/benchmarks.md says how to read the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from systems import SYSTEMS, work
from turns import Facts, Group, SystemFailed
from workload import Workload, chosen_layers

from lander_ds.config.deepspeed_json import load_deepspeed_json
from lander_ds.config.recipe import ModelConfig
from lander_ds.errors import LanderError
from lander_ds.families.loading import hf_config
from lander_ds.run import versions

ROOT = Path(__file__).parents[1]
WARM_UP = 2
"""Steps before the measured ones: in the first, DeepSpeed records the order of modules and buffers are made."""

OTHERS = [name for name in SYSTEMS if name != "lander"]
GOALS = {"full": 0.45, "lora": 0.60, "full_same_logits": 0.70, "lora_same_logits": 0.85}
"""Step time of `lander` over that of the other that this project aims at, for the default model and options."""


@dataclass(frozen=True)
class Measured:
    """One system in one sitting."""

    seconds: list[float]
    """Of each measured step, in order."""
    facts: list[Facts]
    """By rank."""

    @property
    def median(self) -> float:
        """Seconds of the median step."""
        return statistics.median(self.seconds)

    @property
    def peak_bytes(self) -> int:
        """Most resident memory of any rank."""
        return max(fact.peak_bytes for fact in self.facts)


Sitting = dict[str, Measured]
"""The systems that took turns with one another: `lander` and some others."""


def sit(systems: list[str], workload: Workload, logs: Path, profile: bool = False) -> Sitting:
    """Start the systems one after the other, let them take turns to the end, and stop them.

    Every round starts with another system, so that each follows each.
    """
    groups: list[Group] = []
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    try:
        for name in systems:
            say(f"starting {name}")
            directory = logs / name
            directory.mkdir()
            job = work(name, workload, directory)
            groups.append(Group(name, job, workload.ranks, workload.steps, directory, profile))
            groups[-1].wait_until_ready()
        for number in range(workload.steps):
            first = number % len(groups)
            for group in groups[first:] + groups[:first]:
                seconds[group.name].append(group.step())
            last = ", ".join(f"{name} {values[-1]:.2f} s" for name, values in seconds.items())
            say(f"round {number + 1} of {workload.steps}{' (warm-up)' if number < WARM_UP else ''}: {last}")
        return {group.name: Measured(seconds[group.name][WARM_UP:], group.facts()) for group in groups}
    finally:
        for group in groups:
            group.stop()


def ratios(sittings: list[Sitting]) -> dict[str, float]:
    """`ratio_<other>`: median step of `lander` over that of the other in the same sitting. `peak_memory_ratio_<other>`:
    the same for the peak of the rank with the most."""
    found: dict[str, float] = {}
    for sitting in sittings:
        ours = sitting["lander"]
        for name, other in sitting.items():
            if name != "lander":
                found[f"ratio_{name}"] = ours.median / other.median
                found[f"peak_memory_ratio_{name}"] = ours.peak_bytes / other.peak_bytes
    return {key: round(value, 4) for key, value in found.items()}


def result(sittings: list[Sitting], workload: Workload, threads: int) -> dict[str, Any]:
    """Everything that was found, as JSON values."""
    systems = [
        {
            "system": name,
            "sitting": number,
            "step_seconds": {
                "median": round(measured.median, 4),
                "min": round(min(measured.seconds), 4),
                "max": round(max(measured.seconds), 4),
                "all": [round(value, 4) for value in measured.seconds],
            },
            "peak_memory_bytes_per_rank": [fact.peak_bytes for fact in measured.facts],
            "peak_memory_since": measured.facts[0].peak_since,
            "trained_parameters": measured.facts[0].trained_parameters,
            "total_parameters": measured.facts[0].total_parameters,
            "first_loss": measured.facts[0].first_loss,
        }
        for number, sitting in enumerate(sittings, start=1)
        for name, measured in sitting.items()
    ]
    return {
        **ratios(sittings),
        "systems": systems,
        "tokens_per_step": workload.tokens_per_step,
        "target_tokens_per_step": workload.target_tokens_per_step,
        "workload": asdict(workload),
        "model": workload.model,
        "layers": list(workload.layers),
        "dtype": workload.dtype,
        "ranks": workload.ranks,
        "warm_up_steps": WARM_UP,
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "threads_per_rank": threads,
            "load_average": list(os.getloadavg()),
            "versions": versions(),
        },
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
    }


def table(found: dict[str, Any]) -> str:
    """The result for a person."""
    machine = found["machine"]
    lines = [
        f"{found['model']}, {found['dtype']}, {found['ranks']} ranks with {machine['threads_per_rank']} threads each, "
        f"{found['tokens_per_step']} tokens a step ({found['target_tokens_per_step']} of them targets), "
        f"lander trains FFNs of layers {', '.join(map(str, found['layers']))}",
        f"{machine['processor']}, {machine['cores']} cores, torch {machine['versions']['torch']}, "
        f"DeepSpeed {machine['versions']['deepspeed']}, {found['date']}",
        "",
        f"{'system':<18} {'trained':>12} {'median s':>9} {'min':>7} {'max':>7} {'ratio':>7} {'goal':>6} "
        f"{'peak MB':>8} {'ratio':>7}",
    ]
    for entry in found["systems"]:
        name, times = entry["system"], entry["step_seconds"]
        peak = max(entry["peak_memory_bytes_per_rank"]) / 1e6
        line = f"{name:<18} {entry['trained_parameters']:>12,} {times['median']:>9.3f} {times['min']:>7.3f} {times['max']:>7.3f}"
        if name == "lander":
            lines.append(f"{line} {'':>7} {'':>6} {peak:>8.0f}")
        else:
            ratio, memory = found[f"ratio_{name}"], found[f"peak_memory_ratio_{name}"]
            lines.append(f"{line} {ratio:>7.3f} {GOALS[name]:>6.2f} {peak:>8.0f} {memory:>7.3f}")
    lines += ["", "ratio: lander over this system (below 1: lander needs less), from the same sitting"]
    return "\n".join(lines)


def processor() -> str:
    """Name of the processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def say(text: str) -> None:
    """Progress, on standard error."""
    print(f"step: {text}", file=sys.stderr, flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=ROOT / "models" / "gemma3-270m", type=Path, help="HF model directory (%(default)s)")
    add("--ranks", default=2, type=int, help="data-parallel ranks (%(default)s)")
    add("--tokens", default=512, type=int, help="tokens per rank and step (%(default)s)")
    add("--length", default=64, type=int, help="tokens of an example, half prompt, half target (%(default)s)")
    add("--steps", default=8, type=int, help=f"measured steps, after {WARM_UP} for warming up (%(default)s)")
    add("--layers", default="middle", help="layers of lander: middle, last (4 each), or e.g. 0,3,10 (%(default)s)")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="precision (%(default)s)")
    add("--deepspeed", default=ROOT / "ds_configs" / "270m" / "zero3.json", type=Path, help="DeepSpeed JSON of all")
    add("--against", default=",".join(OTHERS), help="the others, with commas (%(default)s)")
    add("--together", default=2, type=int, help="others in memory at the same time as lander (%(default)s)")
    add("--profile", choices=list(SYSTEMS), help="only this system: print where a step's time goes")
    add("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args(arguments)


def read_workload(options: argparse.Namespace) -> Workload:
    """The workload that the command line describes.

    Raises:
        LanderError, ValueError: it cannot be run.
    """
    for name in ("ranks", "tokens", "steps", "together"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1")
    if options.length < 2 or options.tokens % options.length:
        raise ValueError(f"--tokens ({options.tokens}) must be a multiple of --length ({options.length}, at least 2)")
    if unknown := set(options.against.split(",")) - set(OTHERS):
        raise ValueError(f"--against: unknown {', '.join(sorted(unknown))}; there are {', '.join(OTHERS)}")
    load_deepspeed_json(options.deepspeed)
    config, _ = hf_config(ModelConfig(str(options.model)))
    try:
        layers = chosen_layers(options.layers, config.num_hidden_layers)
    except ValueError as error:
        raise ValueError(f"--layers {options.layers}: {error}") from None
    return Workload(
        model=str(options.model),
        deepspeed=str(options.deepspeed),
        dtype=options.dtype,
        ranks=options.ranks,
        tokens=options.tokens,
        length=options.length,
        layers=layers,
        vocabulary=config.vocab_size,
        steps=WARM_UP + options.steps,
    )


def set_environment(ranks: int) -> int:
    """What rank processes inherit; returns their number of threads."""
    threads = int(os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks))))
    # A GPU would serve one rank and not the other; figures are for the processor.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    # All ranks are on this machine, whatever its name resolves to.
    if Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # DeepSpeed starts ninja by name.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return threads


def main() -> int:
    """Run; returns the exit code."""
    options = parse()
    try:
        workload = read_workload(options)
    except (LanderError, ValueError) as error:
        say(f"error: {error}")
        return 2
    threads = set_environment(workload.ranks)
    others = options.against.split(",")
    parts = [others[first : first + options.together] for first in range(0, len(others), options.together)]
    try:
        with tempfile.TemporaryDirectory(prefix="lander-step-") as logs:
            if options.profile:
                measured = sit([options.profile], workload, Path(logs), profile=True)[options.profile]
                print(measured.facts[0].profile)
                return 0
            sittings = []
            for number, part in enumerate(parts):
                directory = Path(logs) / f"sitting-{number + 1}"
                directory.mkdir()
                sittings.append(sit(["lander", *part], workload, directory))
    except SystemFailed as error:
        say(f"error: {error}")
        return 1
    found = result(sittings, workload, threads)
    print(json.dumps(found, indent=2) if options.json else table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
