"""A run directory filled with made-up artefacts of realistic shapes and values."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from lander_ds.common.files import write_json
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.recipe import ModelConfig, Recipe
from lander_ds.config.schema.data import CorpusConfig, DataConfig
from lander_ds.config.schema.method import SelectConfig
from lander_ds.config.schema.results import ScoreConfig
from lander_ds.evaluation.language import LanguageIdentifier
from lander_ds.evaluation.score import means, score_pair
from lander_ds.inference.translations import Translation, write_translations
from lander_ds.method.awareness import Awareness, AwarenessMetadata
from lander_ds.method.select import build_selection

PAIRS = ("en-de", "en-fr", "en-ru", "en-cs")
SAMPLE = Path(__file__).parents[2] / "examples" / "sample"
LAYERS, NEURONS, STEPS = 18, 256, 60


def sample_recipe(run_dir: Path, pairs: tuple[str, ...] = PAIRS) -> Recipe:
    """A recipe whose `run_dir` is the sample run."""
    data = DataConfig(pairs=pairs, corpora=(CorpusConfig("train.{pair}.jsonl"),))
    return Recipe(str(run_dir), ModelConfig("models/base"), data, "zero3.json")


def sample_run(
    path: Path, pairs: tuple[str, ...] = PAIRS, sentences: int = 40
) -> tuple[Recipe, RunDirectory]:
    """Write every artefact that the report reads."""
    recipe, run = sample_recipe(path, pairs), RunDirectory(path)
    run.path.mkdir(parents=True, exist_ok=True)
    awareness = sample_awareness(pairs)
    awareness.save(run.awareness)
    build_selection(awareness, SelectConfig(), seed=1).save(run.selection)
    write_metrics(run, pairs)
    write_statistics(run, pairs)
    write_scores(run, pairs, sentences)
    write_json(
        run.training_summary,
        {
            "method": "lander",
            "trained_parameters": 15_400_000,
            "total_parameters": 268_098_176,
            "ranks": 2,
            "steps": STEPS,
            "optimizer_bytes_per_rank": [92_400_000, 92_400_000],
            "gradient_bytes_per_rank": [15_400_000, 15_400_000],
            "weight_bytes_per_rank": [268_000_000, 268_000_000],
            "peak_memory_bytes_per_rank": [2_100_000_000, 2_050_000_000],
            "frozen_unchanged": True,
            "groups": {"general": 14_000_000, "gates": 400_000},
            "seconds": 431.0,
            "checkpoint": f"checkpoints/step-{STEPS}",
        },
    )
    for stage, seconds in (("detect", 61.0), ("train", 431.0), ("translate.base", 92.0), ("score", 4.0)):
        run.record(stage, {}, {}, [], seconds)
    return recipe, run


def sample_awareness(pairs: tuple[str, ...]) -> Awareness:
    """Heavy-tailed awareness that most neurons share between pairs."""
    random = torch.Generator().manual_seed(0)
    shape = (len(pairs), LAYERS, NEURONS)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=random, dtype=torch.float64)

    depth = torch.linspace(0.3, 1.0, LAYERS, dtype=torch.float64)[None, :, None]
    phi = torch.exp(1.3 * normal(1, LAYERS, NEURONS) + 0.5 * normal(*shape)) * depth * 1e-4
    tokens = torch.full((len(pairs),), 5000.0, dtype=torch.float64)
    scale = 0.02 + 0.1 * torch.rand(1, LAYERS, 1, generator=random, dtype=torch.float64) ** 3
    mean = (normal(1, LAYERS, NEURONS) + 0.2 * normal(*shape)) * scale
    active = torch.rand(shape, generator=random, dtype=torch.float64)
    metadata = AwarenessMetadata("sha256:0", "0", dict.fromkeys(pairs, 128), dict.fromkeys(pairs, 3000))
    each = tokens[:, None, None]
    return Awareness(
        pairs, tokens, mean * each, mean.abs() * each, active * each, phi * each, phi**2 * each, metadata
    )


def write_metrics(run: RunDirectory, pairs: tuple[str, ...]) -> None:
    """metrics.jsonl of a training that converges."""
    random = torch.Generator().manual_seed(1)
    groups = ["general:" + "+".join(pairs), *(f"specific:{pair}" for pair in pairs)]
    lines: list[dict[str, Any]] = []
    for step in range(1, STEPS + 1):
        noise = torch.randn(len(pairs) + 1, generator=random).tolist()
        rate = 3e-4 * 0.5 * (1 + math.cos(math.pi * step / STEPS)) if step > 5 else 6e-5 * step
        losses = {
            pair: 1.5 + 0.2 * row + 1.4 * math.exp(-step / 12) + 0.15 * noise[row]
            for row, pair in enumerate(pairs)
        }
        gates = {
            str(layer): {
                pair: 0.5 + 0.002 * layer * math.tanh(step / 30) * (row - 1) for row, pair in enumerate(pairs)
            }
            for layer in (0, 3, 10, 11)
        }
        lines.append(
            {
                "step": step,
                "loss": sum(losses.values()) / len(losses),
                "loss_per_pair": losses,
                "tokens": 1024,
                "target_tokens": 600,
                "lr": {**dict.fromkeys(groups, rate), "gates": 3.3 * rate},
                "grad_norm": 1.0 + 3 * math.exp(-step / 8) + 0.1 * abs(noise[-1]),
                "gates": gates,
                "alpha": 0.0,
                "tokens_per_second": 150.0,
                "seconds": 7.0,
                "eta_seconds": 7.0 * (STEPS - step),
            }
        )
        if step % 20 == 0:
            valid = {pair: 1.6 + 0.2 * row + math.exp(-step / 12) for row, pair in enumerate(pairs)}
            lines.append(
                {"step": step, "valid_loss": valid, "valid_loss_mean": sum(valid.values()) / len(valid)}
            )
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_statistics(run: RunDirectory, pairs: tuple[str, ...]) -> None:
    """data/statistics.json."""
    counts = {"read": 900, "kept": 861, "tokens": 61234, "target_tokens": 30111, "moved_to_detect": 0}
    dropped = {"duplicate": 12, "test_overlap_normalised": 27}
    splits = {
        split: {**counts, "dropped": dropped if split == "train" else {}}
        for split in ("train", "valid", "test")
    }
    write_json(run.data / "statistics.json", dict.fromkeys(pairs, splits))


def write_scores(run: RunDirectory, pairs: tuple[str, ...], sentences: int) -> None:
    """Translations of three systems, worse to better, and their scores."""
    identifier = LanguageIdentifier({code for pair in pairs for code in pair.split("-")})
    config = ScoreConfig(bootstrap_samples=100)
    scored, signatures = {}, {}
    for pair in pairs:
        lines = (SAMPLE / f"test.{pair}.jsonl").read_text(encoding="utf-8").splitlines()[:sentences]
        rows = [json.loads(line) for line in lines]
        systems = {
            "base": [built(pair, n, row, 0.3) for n, row in enumerate(rows)],
            "fewshot": [built(pair, n, row, 0.5) for n, row in enumerate(rows)],
            "trained": [built(pair, n, row, 0.8) for n, row in enumerate(rows)],
        }
        for system, translations in systems.items():
            write_translations(run.translations / system / f"{pair}.jsonl", translations)
        scored[pair], signatures[pair] = score_pair(pair, systems, config, 1, identifier)
    write_json(
        run.scores,
        {
            "baseline": "base",
            "systems": ["base", "fewshot", "trained"],
            "bootstrap_samples": 100,
            "pairs": scored,
            "mean": means(scored),
            "signatures": signatures,
        },
    )


def built(pair: str, number: int, row: dict[str, str], share: float) -> Translation:
    """A translation that gets the first `share` of the words right and goes on in the source language."""
    words, source = row["tgt"].split(), row["src"].split()
    right = round(share * len(words))
    text = " ".join(words[:right] + source[right:])
    return Translation(f"{pair}:test:{number}", row["src"], row["tgt"], text, len(words))
