"""Runs training micro-batches of tiny models on the fake CUDA device, and writes what was counted as JSON.

Started by `support.fake_cuda.counted` in a process of its own.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from lander_ds.config.recipe import RoutingConfig, TrainConfig
from lander_ds.data.batching.packing import Example, PackedBatch, pack
from lander_ds.distributed import accelerator
from lander_ds.distributed.engines.zero3 import Zero3
from lander_ds.models import attention
from lander_ds.models.catalogue import family_of
from lander_ds.models.parameter_groups import mark_trained
from lander_ds.models.surgery import install
from lander_ds.models.translation_model import BatchTotals, GateStatistics, Objective, TranslationModel
from support.fake_cuda import CUDA, Counts, fake_tensors, load, to_fake_cuda
from support.selections import random_selection
from support.tiny_models import CONFIGS, VOCABULARY

TOTALS = BatchTotals(target_tokens=10, examples=3)
GATES = ("input", "output", "none")


@dataclass(frozen=True)
class Case:
    """One training micro-batch."""

    model: str
    """Case of `tiny_models`."""
    gate: str = "input"
    other_pairs: str = "keep"
    pairs: int = 3
    lengths: tuple[int, ...] = (9, 3, 14)
    """Of the examples."""

    @property
    def name(self) -> str:
        """Under which the figures are written."""
        return f"{self.model}/{self.gate}/{self.other_pairs}/{self.pairs}/{len(self.lengths)}"


MANY_EXAMPLES = (12,) * 64
FAMILIES = tuple(model for model in CONFIGS if "-" not in model)
FORMS = tuple(Case(model, gate) for model in FAMILIES for gate in GATES)
MASKED = (Case("llama", other_pairs="mask"), Case("bloom", other_pairs="mask"))
"""Pair-specific neurons of other pairs switched off."""
PAIRS = tuple(Case(model, pairs=pairs) for model in ("llama", "bloom") for pairs in (2, 32))
EXAMPLES = tuple(Case(model, lengths=lengths) for model in FAMILIES for lengths in ((9,), MANY_EXAMPLES))


class _Engine:
    """What DeepSpeed's engine does around a micro-batch, without ranks and optimizer."""

    def __init__(self, model: TranslationModel) -> None:
        self._model = model

    def train(self) -> None:
        self._model.train()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model(*args, **kwargs)

    def backward(self, loss: torch.Tensor, **_: Any) -> None:
        loss.backward()

    def step(self) -> None:
        """Nothing: the gradients stay."""


def batch(lengths: Sequence[int], pairs: int) -> PackedBatch:
    """Examples of these lengths, half of each prompt, the pairs in turn."""
    ids = np.arange(max(lengths), dtype=np.int32) % (VOCABULARY - 3) + 3
    return pack([Example(ids[:length], length // 2, i % pairs, i) for i, length in enumerate(lengths)])


def run(case: Case) -> dict[str, Any]:
    """Count one training micro-batch, from the packed batch on the host to gradients and figures on the device."""
    part = _translation_model(case)
    packed = batch(case.lengths, case.pairs)
    engine = Zero3.__new__(Zero3)
    engine.model, engine._engine = part, _Engine(part)
    counts = Counts()
    with fake_tensors():
        to_fake_cuda(part)
        # What is made once and kept, such as tables of banks, is no matter of a micro-batch.
        engine.train_step([packed.to(CUDA)], TOTALS, 1.0, GateStatistics())
        part.zero_grad(set_to_none=True)
        with counts:
            engine.train_step([packed.to(CUDA)], TOTALS, 1.0, GateStatistics())
    trained = {name: p.grad for name, p in part.named_parameters() if p.requires_grad}
    return {
        "kernels": sum(counts.kernels.values()),
        "products": counts.products,
        "synchronisations": dict(counts.synchronisations),
        "copies": dict(counts.copies),
        "gradients": len(trained),
        "wrong gradients": [
            name for name, grad in trained.items() if grad is None or grad.device.type != "cuda"
        ],
    }


def _translation_model(case: Case) -> TranslationModel:
    """A tiny model after surgery, on meta, and what trains it."""
    config = CONFIGS[case.model]()
    family = family_of(config.model_type)
    kind = attention.IMPLEMENTATION if family.packed_attention else "eager"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=kind)
    pairs = [f"en-{number:03d}" for number in range(case.pairs)]
    selection = random_selection(family.neurons(model), (1, 2), pairs)
    routing = RoutingConfig(gate=case.gate, other_pairs=case.other_pairs, hidden=8)  # type: ignore[arg-type]
    install(model, family, selection, routing, seed=1)
    mark_trained(model, family, TrainConfig(), selection)
    return TranslationModel(model, family, case.pairs, Objective(0.1, 0.5, 1))


def main(library: Path, output: Path) -> None:
    """Run every case once."""
    figures: dict[str, Any] = {}
    load(library)
    accelerator.device = lambda: CUDA
    for case in {case.name: case for case in (*FORMS, *MASKED, *PAIRS, *EXAMPLES)}.values():
        try:
            figures[case.name] = run(case)
        except Exception:
            figures[case.name] = {"error": traceback.format_exc()}
    output.write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
