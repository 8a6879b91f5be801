"""Runs training micro-batches of tiny models on the fake CUDA device, and writes what was counted as JSON.

Started by `support.fake_cuda.counted` in a process of its own.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from transformers import AutoModelForCausalLM, PreTrainedModel

from lander_ds.config.schema.method import RoutingConfig
from lander_ds.config.schema.training import TrainConfig
from lander_ds.data.batching.packing import Example, PackedBatch, pack
from lander_ds.distributed import accelerator
from lander_ds.distributed.engines.zero3 import Zero3
from lander_ds.models import attention
from lander_ds.models.catalogue import family_of
from lander_ds.models.loss import LossHead
from lander_ds.models.parameter_groups import mark_trained
from lander_ds.models.surgery import install, routed_ffns
from lander_ds.models.translation_model import BatchTotals, GateStatistics, Objective, TranslationModel
from support.fake_cuda import CUDA, Counts, fake_tensors, load, to_fake_cuda
from support.selections import random_selection
from support.tiny_models import CONFIGS, DIFFERENT, VOCABULARY

TOTALS = BatchTotals(target_tokens=10, examples=3)


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


ROUTED_LAYER, LAYERS = 0, 2
"""The trained layer has one above it."""
FAMILIES = tuple(model for model in DIFFERENT if "-" not in model)
FORMS = (
    *(Case(model) for model in FAMILIES),
    *(Case(model, gate) for model in ("llama", "bloom") for gate in ("output", "none")),
)
"""Every family; the other gate forms for a gated and a plain FFN, all that they depend on."""
MASKED = (Case("llama", other_pairs="mask"), Case("bloom", other_pairs="mask"))
"""Specific neurons of other pairs are switched off."""
PAIRS = {model: [Case(model, pairs=pairs) for pairs in (2, 32)] for model in ("llama", "bloom")}
"""Few and many pairs."""
EXAMPLES = {
    model: [Case(model, lengths=(12,) * examples) for examples in (1, 64)]
    for model in ("gpt_neox", "mistral", "gemma2", "bloom")
}
"""One and many examples in a row: in one kernel; by class of lengths, with windows, capped; BLOOM's own attention."""


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


def engine_of(model: TranslationModel) -> Zero3:
    """The product's engine around a stand-in for DeepSpeed's."""
    engine = Zero3.__new__(Zero3)
    engine.model, engine._engine = model, _Engine(model)
    return engine


def batch(lengths: Sequence[int], pairs: int) -> PackedBatch:
    """Examples of these lengths, half of each prompt, the pairs in turn."""
    ids = np.arange(max(lengths), dtype=np.int32) % (VOCABULARY - 3) + 3
    return pack([Example(ids[:length], length // 2, i % pairs, i) for i, length in enumerate(lengths)])


def run(case: Case) -> dict[str, Any]:
    """Count one training micro-batch, from the packed batch on the host to gradients and figures on the device."""
    config = CONFIGS[case.model]()
    config.num_hidden_layers = LAYERS
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:LAYERS]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=attention_of(case)
        )
    part = operated(case, model)
    packed = batch(case.lengths, case.pairs)
    engine = engine_of(part)
    counts = Counts()
    with fake_tensors():
        to_fake_cuda(part)
        for _, ffn in routed_ffns(part):
            # Tables of banks are made once and kept: no matter of a micro-batch.
            ffn._parts_on(CUDA)
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


def attention_of(case: Case) -> str:
    """The attention implementation that the trainer builds the case with."""
    packed = family_of(CONFIGS[case.model]().model_type).packed_attention
    return attention.IMPLEMENTATION if packed else "eager"


def operated(case: Case, model: PreTrainedModel) -> TranslationModel:
    """A tiny model after surgery, and what trains it."""
    family = family_of(model.config.model_type)
    pairs = [f"en-{number:03d}" for number in range(case.pairs)]
    selection = random_selection(family.neurons(model), (ROUTED_LAYER,), pairs)
    routing = RoutingConfig(gate=case.gate, other_pairs=case.other_pairs, hidden=8)  # type: ignore[arg-type]
    install(model, family, selection, routing, seed=1)
    mark_trained(model, family, TrainConfig(), selection)
    return TranslationModel(model, family, case.pairs, Objective(0.1, 0.5, 1))


def head() -> int:
    """Kernels of the loss, with its gradient, of 2,048 target tokens with a vocabulary of 262,144."""
    counts = Counts()
    with fake_tensors(), counts:
        weight = torch.empty(262_144, 640, dtype=torch.bfloat16, device=CUDA)
        hidden = torch.empty(2048, 640, dtype=torch.bfloat16, device=CUDA, requires_grad=True)
        targets = torch.empty(2048, dtype=torch.int64, device=CUDA)
        layer = torch.nn.Linear(1, 1, bias=False, device="meta")
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        LossHead(layer, None)(hidden, targets).sum().backward()
    return sum(counts.kernels.values())


def waiting() -> dict[str, int]:
    """How often the counter says that the host waits in small known cases."""
    with fake_tensors():
        x = torch.ones(4, device=CUDA)
        ids = torch.ones(4, dtype=torch.int64, device=CUDA)
        host = torch.zeros(4, dtype=torch.int64)
    actions: dict[str, Callable[[], object]] = {
        "item": lambda: x.sum().item(),
        "to the host": x.cpu,
        "from the host": lambda: host.to(CUDA),
        "boolean index": lambda: x[x > 0],
        "nonzero": x.nonzero,
        "index from the host": lambda: x[host],
        "repeats of unknown sum": lambda: x.repeat_interleave(ids),
        "asynchronous copy": lambda: host.to(CUDA, non_blocking=True),
        "integer index": lambda: x[ids],
        "repeats of known sum": lambda: x.repeat_interleave(ids, output_size=4),
    }
    found = {}
    for name, action in actions.items():
        counts = Counts()
        # Values that fake tensors have not got are asked for.
        with x.fake_mode, counts, suppress(DataDependentOutputException, DynamicOutputShapeException):  # type: ignore[attr-defined]
            action()
        found[name] = sum(counts.synchronisations.values())
    return found


class _Card:
    """What DeepSpeed says of an Ampere card."""

    def is_triton_supported(self) -> bool:
        return True


def main(library: Path, output: Path) -> None:
    """Run every case once."""
    load(library)
    figures: dict[str, Any] = {"waiting": waiting(), "head": head()}
    # What a card would answer.
    accelerator.device = lambda: CUDA
    vars(attention)["get_accelerator"] = _Card
    contrasts = [case for cases in (*PAIRS.values(), *EXAMPLES.values()) for case in cases]
    for case in (*FORMS, *MASKED, *contrasts):
        try:
            figures[case.name] = run(case)
        except Exception:
            figures[case.name] = {"error": traceback.format_exc()}
    output.write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    # The fake device is not made for an orderly end of the process.
    sys.stdout.flush()
    os._exit(0)
