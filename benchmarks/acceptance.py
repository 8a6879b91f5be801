#!/usr/bin/env python
"""The first look at a card: does it run, how fast, and does it survive? One command, no network, no downloaded model.

    python benchmarks/acceptance.py                      # all three parts, each below --minutes
    python benchmarks/acceptance.py --parts speed --sizes 7b
    python benchmarks/acceptance.py --bundle lander.tar.gz   # what a machine without network needs besides the packages

`tests` runs the tests that need a card. `speed` trains models of the published shapes, with random weights, and puts
tokens per second, model FLOP utilisation, peak memory and the share of time in which the card was busy beside what
`lander plan` predicts. `life` kills a training, resumes it, compares the weights with those of one that nobody killed, and
then translates and exports. Where there is no card everything but `tests` runs on the CPU (`--sizes tiny`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from threading import Event, Thread
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PretrainedConfig

from lander_ds.checkpoint import checkpoint
from lander_ds.cluster.planning.cluster import Cluster
from lander_ds.cluster.planning.plan import GB, Planner
from lander_ds.cluster.planning.workload import Workload
from lander_ds.config.loading import load_recipe
from lander_ds.config.recipe import ModelConfig, Recipe
from lander_ds.config.schema.data import CorpusConfig, DataConfig
from lander_ds.data.tokens.sentencepiece_training import train_tokenizer

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "examples" / "sample"
PAIRS = ("en-de", "en-fr", "en-ru", "en-cs")
TOKENS = 4000
"""Pieces of the tokenizer; the models' vocabularies keep their published sizes."""
BUNDLE_BYTES = 60 * 10**6
WARM_UP = 3
"""Steps that are not timed."""
LIFE_STEPS, KILLED_AFTER = 8, 4
METHODS = ("lander", "lora", "full")

SHAPES: Mapping[str, Callable[[], PretrainedConfig]] = {
    "tiny": lambda: Gemma3TextConfig(
        vocab_size=TOKENS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=64,
    ),
    "270m": lambda: Gemma3TextConfig(
        vocab_size=262144,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
    ),
    "1b": lambda: LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    ),
    "7b": lambda: LlamaConfig(
        vocab_size=32768,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
}
"""Gemma 3 270M, Llama 3.2 1B, Mistral 7B v0.3."""

RECIPE = """\
run_dir: unused
topology: replicated
deepspeed: {root}/ds_configs/270m/replicated.json
model: {{path: {model}, dtype: bfloat16}}
data:
  pairs: [{pairs}]
  cache_dir: {cache}
  corpora:
    - {{path: "{sample}/train.{{pair}}.jsonl"}}
    - {{path: "{sample}/valid.{{pair}}.jsonl", split: valid, limit: 8}}
    - {{path: "{sample}/test.{{pair}}.jsonl", split: test, limit: 8}}
  detect_examples: 32
detect: {{batch_tokens: {pack}}}
train: {{batch_tokens: {batch}, pack_tokens: {pack}, lr: {{general: 1.0e-5, specific: 1.0e-5}}}}
translate: {{systems: [trained], max_new_tokens: 16}}
score: {{bootstrap_samples: 50}}
export: {{formats: [routed, dense]}}
"""


@dataclass(frozen=True)
class Card:
    """What computes."""

    name: str
    memory: float
    """GB."""
    tflops: float
    """Peak of dense products in bfloat16."""


class Busy:
    """How much of the time the card computes, asked of nvidia-smi every half second; None where there is none."""

    def __init__(self) -> None:
        self._shares: list[float] = []
        self._end = Event()
        self._thread = Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Busy:
        if shutil.which("nvidia-smi") and torch.cuda.is_available():
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--id=0"]
        while not self._end.wait(0.5):
            answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
            if answer.isdecimal():
                self._shares.append(int(answer) / 100)

    @property
    def share(self) -> float | None:
        """Upper half of the answers: the lower one is loading and saving."""
        upper = sorted(self._shares)[len(self._shares) // 2 :]
        return sum(upper) / len(upper) if upper else None


class Acceptance:
    """Models, recipes and runs in a directory of their own."""

    def __init__(self, out: Path, card: Card, deadline: float, batch: int, pack: int) -> None:
        self.out, self.card, self.deadline = out, card, deadline
        self.batch, self.pack = batch, pack

    def recipe(self, size: str) -> Path:
        """The recipe of a size, its model made where it is missing."""
        model, path = self.out / "models" / size, self.out / f"{size}.yaml"
        if not (model / "config.json").exists():
            say(f"{size}: random weights")
            corpora = (CorpusConfig(str(SAMPLE / "train.{pair}.jsonl"), limit=2000),)
            unused = Recipe("unused", ModelConfig("unused"), DataConfig(PAIRS, corpora), "unused")
            train_tokenizer(unused, model, TOKENS)
            config = SHAPES[size]()
            config.update({"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2})
            torch.manual_seed(1)
            with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
                built = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            built.save_pretrained(model)
            del built
            torch.cuda.empty_cache()
        places = {"root": ROOT, "model": model, "sample": SAMPLE, "cache": self.out / "cache"}
        text = RECIPE.format(**places, pairs=", ".join(PAIRS), batch=self.batch, pack=self.pack)
        path.write_text(text, encoding="utf-8")
        return path

    def start(self, name: str, recipe: Path, stages: str, settings: Sequence[str]) -> subprocess.Popen[bytes]:
        """`lander all` in the run directory `name`, its output in NAME.log."""
        command = [sys.executable, "-m", "lander_ds", "all", "--stages", stages, "--auto-resume"]
        command += ["--recipe", str(recipe), "--set", f"run_dir={self.out / name}"]
        for setting in settings:
            command += ["--set", setting]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        with (self.out / f"{name}.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def finish(self, process: subprocess.Popen[bytes]) -> str:
        """Wait for its end, or that of the part's time; empty, or what went wrong."""
        try:
            code = process.wait(max(1.0, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return "out of time"
        return "" if code == 0 else f"exit code {code}"

    def speed(self, size: str, method: str, steps: int) -> dict[str, Any]:
        """A short training: what it took, and what the planner says of it."""
        name, recipe = f"{size}-{method}", self.recipe(size)
        settings = [f"train.method={method}", f"train.steps={WARM_UP + steps}", "train.valid_examples=1"]
        say(f"{name}: {steps} steps")
        stages = "prepare,detect,select,train" if method == "lander" else "prepare,train"
        with Busy() as busy:
            failure = self.finish(self.start(name, recipe, stages, settings))
        row: dict[str, Any] = {"size": size, "method": method}
        if failure:
            return row | {"failure": f"{failure}: {self.out / name}.log"}
        run = self.out / name
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        timed = [record for record in records if record.get("step", 0) > WARM_UP and "seconds" in record]
        seconds = median(record["seconds"] for record in timed)
        tokens = sum(r["tokens"] for r in timed) / len(timed)
        targets = sum(r["target_tokens"] for r in timed) / len(timed)
        examples = sum(r["examples"] for r in timed) / len(timed)
        summary = json.loads((run / "training.json").read_text())
        planned = self._plan(recipe, run, settings, Workload(round(tokens / examples), targets / tokens))
        operations = planned["operations"] * tokens
        return row | {
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
            "mfu": operations / seconds / (self.card.tflops * 1e12),
            "busy": busy.share,
            "peak_gb": max(summary["peak_memory_bytes_per_rank"]) / GB,
            "planned_gb": planned["gb"],
            "planned_seconds": planned["seconds"] * tokens / self.batch,
        }

    def _plan(self, recipe: Path, run: Path, settings: Sequence[str], workload: Workload) -> dict[str, float]:
        """Operations per token, GB and seconds of a step by the planner."""
        own = load_recipe(recipe, [f"run_dir={run}", *settings])
        cluster = Cluster(1, 1, self.card.memory, self.card.memory, self.card.tflops, 100.0, 25.0)
        plan = Planner(own, workload).plan(cluster, own, "replicated", 1)
        total = sum(part.operations.total for part in plan.parts)
        return {
            "operations": total / plan.tokens,
            "gb": plan.device_bytes / GB,
            "seconds": plan.step_seconds,
        }

    def life(self, size: str) -> dict[str, Any]:
        """Kill and resume, then every other stage."""
        recipe, stages = self.recipe(size), "prepare,detect,select,train"
        settings = [f"train.steps={LIFE_STEPS}", f"train.save_every={KILLED_AFTER}"]
        say(f"{size}: a training that nobody kills")
        failure = self.finish(self.start("whole", recipe, stages, settings))
        if failure:
            return {"size": size, "failure": f"{failure}: {self.out / 'whole'}.log"}
        say(f"{size}: one that is killed behind step {KILLED_AFTER}, and resumed")
        process = self.start("killed", recipe, stages, settings)
        first = self.out / "killed" / "checkpoints" / f"step-{KILLED_AFTER}"
        while process.poll() is None and not first.exists() and time.monotonic() < self.deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        begun = time.monotonic()
        everything = f"{stages},translate,score,export,report"
        failure = self.finish(self.start("killed", recipe, everything, settings))
        if failure:
            return {"size": size, "failure": f"{failure}: {self.out / 'killed'}.log"}
        whole, killed = (
            checkpoint.load(self.out / run / "checkpoints" / f"step-{LIFE_STEPS}").trained()
            for run in ("whole", "killed")
        )
        return {
            "size": size,
            "largest_difference": max(float((whole[n] - killed[n]).abs().max()) for n in whole),
            "largest_change": self._largest_change(whole),
            "seconds_after_the_kill": time.monotonic() - begun,
            "exports": sorted(path.name for path in (self.out / "killed" / "export").iterdir()),
        }

    def _largest_change(self, whole: checkpoint.StoredTensors) -> float:
        """By how much training has changed a weight since the first checkpoint, to compare differences with."""
        first = checkpoint.load(self.out / "whole" / "checkpoints" / f"step-{KILLED_AFTER}").trained()
        return max(float((whole[name] - first[name]).abs().max()) for name in whole)


def card_tests(minutes: float) -> dict[str, Any]:
    """The tests marked `gpu`."""
    say("tests that need a card")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        str(ROOT / "tests"),
    ]
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=60 * minutes, check=False, cwd=ROOT
        )
    except subprocess.TimeoutExpired:
        return {"failure": f"not done after {minutes:g} minutes"}
    last = ended.stdout.strip().splitlines()[-1:] or ended.stderr.strip().splitlines()[-1:]
    result = {"summary": "".join(last)}
    return result if ended.returncode == 0 else result | {"failure": ended.stdout[-4000:]}


def write_bundle(path: Path) -> int:
    """Pack the tracked files; returns the bytes.

    Raises:
        ValueError: they are more than a bundle may have.
    """
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(path, "w:gz") as archive:
        for name in sorted(filter(None, names.decode().split("\0"))):
            archive.add(ROOT / name, f"lander/{name}")
    size = path.stat().st_size
    if size > BUNDLE_BYTES:
        raise ValueError(f"{path}: {size / 1e6:.0f} MB, more than {BUNDLE_BYTES / 1e6:.0f}")
    return size


def table(result: Mapping[str, Any]) -> str:
    """What was measured, as Markdown."""
    lines = [f"{result['card']['name']}, {result['date']}, PyTorch {result['torch']}", ""]
    if "tests" in result:
        lines += [
            f"Tests: {result['tests'].get('summary', '')} {result['tests'].get('failure', '')}".strip(),
            "",
        ]
    if speed := result.get("speed"):
        names = ("tokens/s", "step (s)", "planned (s)", "MFU", "busy", "peak (GB)", "planned (GB)")
        lines += ["| size | method | " + " | ".join(names) + " |", "| --- | --- |" + " --: |" * len(names)]
        lines += [f"| {row['size']} | {row['method']} | {_cells(row)} |" for row in speed] + [""]
    for row in result.get("life", ()):
        lines.append(
            f"{row['size']}: {row['failure']}"
            if "failure" in row
            else f"{row['size']}: killed and resumed, weights differ by at most {row['largest_difference']:.1e} (training "
            f"changed them by up to {row['largest_change']:.1e}); exports: {', '.join(row['exports'])}"
        )
    return "\n".join(lines)


def _cells(row: Mapping[str, Any]) -> str:
    if "failure" in row:
        return f"{row['failure']} |" + " |" * 5
    busy = "" if row["busy"] is None else f"{row['busy']:.0%}"
    return (
        f"{row['tokens_per_second']:,.0f} | {row['seconds']:.3f} | {row['planned_seconds']:.3f} | {row['mfu']:.1%} | "
        f"{busy} | {row['peak_gb']:.2f} | {row['planned_gb']:.2f}"
    )


def say(text: str) -> None:
    """Progress, on standard error."""
    print(f"acceptance: {text}", file=sys.stderr, flush=True)


def find_card(tflops: float) -> Card:
    """The first CUDA device, or the CPU."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Card(properties.name, properties.total_memory / GB, tflops)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Card("CPU", memory / GB, tflops)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--parts", default="tests,speed,life", help="with commas (%(default)s)")
    add("--sizes", default="270m,1b,7b", help=f"with commas, of {','.join(SHAPES)} (%(default)s)")
    add("--methods", default=",".join(METHODS), help="with commas (%(default)s)")
    add("--steps", type=int, default=10, help=f"timed steps, after {WARM_UP} (%(default)s)")
    add("--batch-tokens", type=int, default=16384, help="of a global batch (%(default)s)")
    add("--pack-tokens", type=int, default=8192, help="of a packed row (%(default)s)")
    add("--tflops", type=float, default=989.0, help="peak in bfloat16, dense (%(default)s: H100, H200)")
    add("--minutes", type=float, default=9.0, help="of a part (%(default)s)")
    add("--out", type=Path, default=ROOT / "runs" / "acceptance", help="directory (%(default)s)")
    add("--bundle", type=Path, metavar="FILE", help="write the bundle and end")
    options = parser.parse_args(arguments)
    if options.bundle:
        print(f"{options.bundle}: {write_bundle(options.bundle) / 1e6:.1f} MB")
        return 0
    parts, sizes = options.parts.split(","), options.sizes.split(",")
    for key, given, known in (
        ("--parts", parts, ("tests", "speed", "life")),
        ("--sizes", sizes, SHAPES),
        ("--methods", options.methods.split(","), METHODS),
    ):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"{key}: unknown {unknown[0]}; there are {', '.join(known)}")
    options.out.mkdir(parents=True, exist_ok=True)
    card, out = find_card(options.tflops), options.out.resolve()
    result: dict[str, Any] = {
        "card": vars(card),
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
    }

    def part() -> Acceptance:
        deadline = time.monotonic() + 60 * options.minutes
        return Acceptance(out, card, deadline, options.batch_tokens, options.pack_tokens)

    if "tests" in parts:
        result["tests"] = card_tests(options.minutes)
    if "speed" in parts:
        own = part()
        result["speed"] = [
            own.speed(size, method, options.steps) for size in sizes for method in options.methods.split(",")
        ]
    if "life" in parts:
        result["life"] = [part().life(sizes[0])]
    (out / "results.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(result))
    everything = (result.get("tests", {}), *result.get("speed", ()), *result.get("life", ()))
    return int(any("failure" in row for row in everything))


if __name__ == "__main__":
    sys.exit(main())
