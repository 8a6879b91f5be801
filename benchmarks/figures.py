"""From measured steps to the figures and the table of the step benchmark."""

from __future__ import annotations

import os
import platform
import shlex
import statistics
import sys
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from turns import Facts, StepTime
from workload import Workload

from lander_ds.common.run_directory import versions

OWN = {"replicated": "lander", "cached": "lander", "replicated_cached": "replicated"}
"""This trainer, too, with another option -> the same without it: what its ratios are over."""

GOALS = {
    "full": 0.45,
    "lora": 0.60,
    "full_same_logits": 0.70,
    "lora_same_logits": 0.85,
    "ungated": 1.03,
    "replicated": 0.85,
    "cached": 0.80,
    "replicated_cached": 0.80,
}
"""Ratios of step times that this project aims at, for the default model and options: `lander` over another system, or
one of `OWN` over what it varies."""


@dataclass(frozen=True)
class Measured:
    """One system in one sitting."""

    times: list[StepTime]
    """Of each measured step, in order."""
    facts: list[Facts]
    """By rank."""

    @property
    def median(self) -> float:
        """Seconds of the median step."""
        return statistics.median(taken.seconds for taken in self.times)

    @property
    def processor_median(self) -> float:
        """Processor seconds of the median step, of all ranks together."""
        return statistics.median(taken.processor_seconds for taken in self.times)

    @property
    def peak_bytes(self) -> int:
        """Most resident memory of any rank."""
        return max(fact.peak_bytes for fact in self.facts)


Sitting = dict[str, Measured]
"""The systems that took turns with one another: `lander` and some others."""


def ratios(sittings: list[Sitting]) -> dict[str, float]:
    """Of `lander` over each other system in the same sitting; of those of `OWN` over what they vary, where it is there.

    `ratio_<other>`: median step on the clock. `processor_ratio_<other>`: median processor time of a step.
    `peak_memory_ratio_<other>`: peak of the rank with the most.
    """
    actual: dict[str, float] = {}
    for sitting in sittings:
        for name, other in sitting.items():
            over = OWN.get(name, name)
            if name != "lander" and over in sitting:
                one, two = (other, sitting[over]) if name in OWN else (sitting["lander"], other)
                actual[f"ratio_{name}"] = one.median / two.median
                actual[f"processor_ratio_{name}"] = one.processor_median / two.processor_median
                actual[f"peak_memory_ratio_{name}"] = one.peak_bytes / two.peak_bytes
    return {key: round(value, 4) for key, value in actual.items()}


def result(
    sittings: list[Sitting], workload: Workload, warm_up: int, threads: int, load: float
) -> dict[str, Any]:
    """Everything that was found, as JSON values.

    Args:
        sittings: what was measured.
        workload: what was trained.
        warm_up: steps of it that were not measured.
        threads: of each rank.
        load: the machine's load average before the first step; on an idle machine it is near 0.
    """
    systems = [
        {
            "system": name,
            "sitting": number,
            "step_seconds": _spread([taken.seconds for taken in measured.times]),
            "processor_seconds": _spread([taken.processor_seconds for taken in measured.times]),
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
        **asdict(workload),
        "tokens_per_step": workload.tokens_per_step,
        "target_tokens_per_step": workload.target_tokens_per_step,
        "warm_up_steps": warm_up,
        **circumstances(threads, load),
    }


def circumstances(threads: int, load: float) -> dict[str, Any]:
    """Where, when and how something was measured.

    Args:
        threads: of each rank.
        load: the machine's load average before the first step.
    """
    return {
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "threads_per_rank": threads,
            "load_before": load,
            "versions": versions(),
        },
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
    }


def _spread(values: list[float]) -> dict[str, Any]:
    digits = [round(value, 4) for value in values]
    median = round(statistics.median(values), 4)
    return {"median": median, "min": min(digits), "max": max(digits), "all": digits}


def table(actual: dict[str, Any]) -> str:
    """The result for a person."""
    machine = actual["machine"]
    lines = [
        f"{actual['model']}, {actual['dtype']}, {actual['ranks']} ranks with {machine['threads_per_rank']} threads each, "
        f"{actual['tokens_per_step']} tokens a step ({actual['target_tokens_per_step']} of them targets), "
        f"lander trains FFNs of layers {', '.join(map(str, actual['layers']))}",
        f"{machine['processor']}, {machine['cores']} cores, torch {machine['versions']['torch']}, "
        f"DeepSpeed {machine['versions']['deepspeed']}, load before {machine['load_before']:.1f}, {actual['date']}",
        "",
        _row(
            "system",
            "trained",
            "median s",
            "min",
            "max",
            "ratio",
            "goal",
            "cpu s",
            "ratio",
            "peak MB",
            "ratio",
        ),
    ]
    for entry in actual["systems"]:
        name, times = entry["system"], entry["step_seconds"]
        keys = ("ratio", "processor_ratio", "peak_memory_ratio")
        of_this = (actual.get(f"{key}_{name}") for key in keys)
        step, processor, memory = ("" if value is None else f"{value:.3f}" for value in of_this)
        lines.append(
            _row(
                name,
                f"{entry['trained_parameters']:,}",
                *(f"{times[key]:.3f}" for key in ("median", "min", "max")),
                step,
                f"{GOALS[name]:.2f}" if name in GOALS else "",
                f"{entry['processor_seconds']['median']:.3f}",
                processor,
                f"{max(entry['peak_memory_bytes_per_rank']) / 1e6:,.0f}",
                memory,
            )
        )
    lines += [
        "",
        "ratio: of lander to this system in the same sitting (below 1: lander needs less);",
        "of replicated and cached to lander, of replicated_cached to replicated",
    ]
    return "\n".join(lines)


def _row(name: str, trained: str, *cells: str) -> str:
    return f"{name:<17}{trained:>12}" + "".join(f"{cell:>9}" for cell in cells)


def processor() -> str:
    """Name of the processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()
