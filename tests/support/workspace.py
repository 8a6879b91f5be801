"""A small workspace: a sound recipe with its DeepSpeed JSON, corpora and a model directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RECIPE = """\
run_dir: run
deepspeed: zero3.json
model:
  path: model
  dtype: float32
data:
  pairs: [en-de, en-fr]
  corpora:
    - path: train.{pair}.jsonl
    - {path: "valid.{pair}.jsonl", split: valid}
    - {path: "test.{pair}.jsonl", split: test}
  max_length: 64
train:
  steps: 10
  batch_tokens: 256
  pack_tokens: 128
  lr: {general: 1e-4}
"""

DEEPSPEED: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 3, "overlap_comm": False},
}


class Workspace:
    """A directory with a sound recipe, its DeepSpeed JSON, corpora, and a model directory without weights."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.deepspeed = path / "zero3.json"
        self.recipe.write_text(RECIPE, encoding="utf-8")
        self.write_deepspeed()
        (path / "model").mkdir()
        (path / "model" / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 6}')
        line = json.dumps({"src": "One sentence.", "tgt": "Ein Satz."}) + "\n"
        for split in ("train", "valid", "test"):
            for pair in ("en-de", "en-fr"):
                (path / f"{split}.{pair}.jsonl").write_text(line)

    def write_deepspeed(self, remove: str = "", **changes: Any) -> None:
        """Write the JSON with top-level keys changed; a dict is merged into the one that is there."""
        merged = {key: value for key, value in DEEPSPEED.items() if key != remove}
        for key, value in changes.items():
            both = isinstance(value, dict) and isinstance(merged.get(key), dict)
            merged[key] = {**merged[key], **value} if both else value
        self.deepspeed.write_text(json.dumps(merged, indent=2), encoding="utf-8")
