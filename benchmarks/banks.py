"""What the number of pairs costs in a routed FFN: forward and backward pass of one layer, against the plain FFN.

    python benchmarks/banks.py [--width 640] [--neurons 2048] [--tokens 1024] [--dtype bfloat16] [--output banks.json]

Nine tenths of the neurons are general, the others divided among the pairs; tokens belong to the pairs in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from lander_ds.config.schema.method import RoutingConfig
from lander_ds.config.schema.training import TrainConfig
from lander_ds.method.selection import Bank, LayerSelection, Selection
from lander_ds.models.catalogue import family_of
from lander_ds.models.parameter_groups import mark_trained
from lander_ds.models.routed_ffn import Routing, routed
from lander_ds.models.surgery import install

PAIRS = (2, 8, 32)
GENERAL = 0.9
ROUNDS = 15


def selection(neurons: int, pairs: int) -> Selection:
    """One layer with a general bank and one specific bank per pair."""
    names = tuple(f"en-{number}" for number in range(pairs))
    general = int(GENERAL * neurons)
    sizes = [(neurons - general) // pairs] * pairs
    sizes[-1] += neurons - general - sum(sizes)
    banks = [Bank("general", names, general)]
    banks += [Bank("specific", (name,), size) for name, size in zip(names, sizes, strict=True)]
    order = torch.randperm(neurons, generator=torch.Generator().manual_seed(0))
    return Selection(names, neurons, (LayerSelection(0, order, tuple(banks)),), {})


def passes(width: int, neurons: int, tokens: int, dtype: torch.dtype, pairs: int) -> Callable[[], None]:
    """Forward and backward pass of an FFN with banks for `pairs` pairs; 0: of the plain one, all trained."""
    config = Gemma3TextConfig(
        vocab_size=8, hidden_size=width, intermediate_size=neurons, num_hidden_layers=1, head_dim=8
    )
    model, family = AutoModelForCausalLM.from_config(config, dtype=dtype), family_of(config.model_type)
    routing = Routing(torch.arange(tokens) % max(pairs, 1))
    if pairs:
        chosen = selection(neurons, pairs)
        install(model, family, chosen, RoutingConfig(), seed=1)
        mark_trained(model, family, TrainConfig(), chosen)
    ffn = family.layers_of(model)[0].get_submodule("mlp").train()
    x = torch.randn(tokens, width).to(dtype).requires_grad_()

    def once() -> None:
        with routed(routing):
            output = ffn(x)
        output.backward(output.detach())
        ffn.zero_grad(set_to_none=True)

    return once


def main() -> None:
    """Measure in turns, so that other work on the machine meets all alike; medians in milliseconds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--neurons", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    cases = {
        pairs: passes(options.width, options.neurons, options.tokens, dtype, pairs) for pairs in (0, *PAIRS)
    }
    times: dict[int, list[float]] = {pairs: [] for pairs in cases}
    for number in range(ROUNDS + 2):
        for pairs, once in cases.items():
            # The time of this process: other work on the machine does not count.
            began = time.process_time()
            once()
            if number >= 2:
                times[pairs].append(1e3 * (time.process_time() - began))
    medians = {pairs: round(statistics.median(values), 2) for pairs, values in times.items()}
    figures = {
        "plain_ms": medians[0],
        "routed_ms": {str(pairs): medians[pairs] for pairs in PAIRS},
        "pairs_ratio": round(medians[PAIRS[-1]] / medians[PAIRS[0]], 3),
    }
    print(json.dumps(figures, indent=2))
    if options.output is not None:
        options.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
