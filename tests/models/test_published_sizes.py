"""Surgery on meta tensors of published models; the counts are compared with arithmetic written out here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.selections import random_selection
from transformers import PreTrainedModel

from lander_ds.config.recipe import ModelConfig
from lander_ds.config.schema.method import RoutingConfig
from lander_ds.models.loading import build
from lander_ds.models.surgery import install, remove, routed_ffns


@dataclass(frozen=True)
class Published:
    """A model as its authors published it."""

    config: dict[str, Any]
    d: int
    f: int
    layers: int
    total: int
    """Parameters, tied ones once."""
    gated: bool = True


def llama_like(
    d: int, f: int, layers: int, vocabulary: int, query: int, key: int, tied: bool = False, extra: int = 0
) -> int:
    """Embedding (and head), per layer q, k, v, o, three FFN matrices, two norms and `extra`, final norm."""
    attention = d * query + 2 * d * key + query * d
    return vocabulary * d * (1 if tied else 2) + layers * (attention + 3 * d * f + 2 * d + extra) + d


def bloom(d: int, layers: int, vocabulary: int) -> int:
    """Tied embedding with a norm, per layer q/k/v, o, up and down with biases and two norms, final norm."""
    attention = 3 * d * d + 3 * d + d * d + d
    ffn = 2 * d * 4 * d + 4 * d + d
    return vocabulary * d + 2 * d + layers * (attention + ffn + 4 * d) + 2 * d


LLAMA = {"model_type": "llama", "vocab_size": 32000, "hidden_act": "silu", "rms_norm_eps": 1e-5}
MODELS = {
    "LLaMA-2-7B": Published(
        {**LLAMA, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "num_key_value_heads": 32},
        d=4096,
        f=11008,
        layers=32,
        total=6_738_415_616,
    ),
    "LLaMA-2-70B": Published(
        {**LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
        | {"num_attention_heads": 64, "num_key_value_heads": 8},
        d=8192,
        f=28672,
        layers=80,
        total=llama_like(8192, 28672, 80, 32000, query=64 * 128, key=8 * 128),
    ),
    "BLOOM-7b1": Published(
        {
            "model_type": "bloom",
            "vocab_size": 250880,
            "n_embed": 4096,
            "n_layer": 30,
            "num_attention_heads": 32,
        },
        d=4096,
        f=16384,
        layers=30,
        total=7_069_016_064,
        gated=False,
    ),
    "BLOOM-176B": Published(
        {"model_type": "bloom", "vocab_size": 250880, "n_embed": 14336, "n_layer": 70}
        | {"num_attention_heads": 112},
        d=14336,
        f=57344,
        layers=70,
        total=bloom(14336, 70, 250880),
        gated=False,
    ),
    "Qwen3-8B": Published(
        {"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288}
        | {"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
        d=4096,
        f=12288,
        layers=36,
        # A norm of head_dim on queries and on keys.
        total=llama_like(4096, 12288, 36, 151936, query=32 * 128, key=8 * 128, extra=2 * 128),
    ),
    "Qwen3-30B-A3B": Published(
        {"model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144}
        | {"num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}
        | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
        d=2048,
        f=128 * 768,
        layers=48,
        # The router, and norms as above.
        total=llama_like(
            2048, 128 * 768, 48, 151936, query=32 * 128, key=4 * 128, extra=2 * 128 + 128 * 2048
        ),
    ),
    "Mixtral-8x7B-v0.1": Published(
        {"model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336}
        | {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
        | {"num_local_experts": 8, "num_experts_per_tok": 2},
        d=4096,
        f=8 * 14336,
        layers=32,
        total=46_702_792_704,
    ),
    "Mistral-7B-v0.1": Published(
        {"model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336}
        | {
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
        d=4096,
        f=14336,
        layers=32,
        total=7_241_732_096,
    ),
    "Gemma-3-27B": Published(
        {
            "model_type": "gemma3",
            "text_config": {
                "model_type": "gemma3_text",
                "vocab_size": 262208,
                "hidden_size": 5376,
                "intermediate_size": 21504,
                "num_hidden_layers": 62,
                "num_attention_heads": 32,
                "num_key_value_heads": 16,
                "head_dim": 128,
                "query_pre_attn_scalar": 168,
                "sliding_window": 1024,
            },
            "vision_config": {"model_type": "siglip_vision_model"},
        },
        d=5376,
        f=21504,
        layers=62,
        # Norms after attention and FFN too, and of head_dim on queries and keys.
        total=llama_like(
            5376, 21504, 62, 262208, query=32 * 128, key=16 * 128, tied=True, extra=2 * 5376 + 2 * 128
        ),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_counts_are_what_arithmetic_says(name: str, tmp_path: Path) -> None:
    published = MODELS[name]
    d, f = published.d, published.f
    (tmp_path / "config.json").write_text(json.dumps(published.config))
    model, family = build(ModelConfig(path=str(tmp_path)))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert len(family.layers_of(model)) == published.layers
    assert family.neurons(model) == f
    assert total(model) == published.total

    chosen = (0, published.layers // 2, published.layers // 2 + 1, published.layers - 1)
    selection = random_selection(f, chosen)
    install(model, family, selection, RoutingConfig(), seed=1)

    per_neuron = 3 * d if published.gated else 2 * d + 1
    gate = 128 * d + 128 + 128 + 1
    assert gates(model) == 4 * gate
    assert total(model) == published.total + 4 * gate
    for chosen_layer, (_, ffn) in zip(selection.layers, routed_ffns(model), strict=True):
        assert sum(bank.up.shape[0] for bank in ffn.banks) == f  # type: ignore[index, misc]
        for bank, module in zip(chosen_layer.banks, ffn.banks, strict=True):
            assert sum(p.numel() for p in module.parameters()) == bank.size * per_neuron
    trained_neurons = sum(
        bank.size for layer in selection.layers for bank in layer.banks if bank.kind != "frozen"
    )
    assert trained(model) == trained_neurons * per_neuron + 4 * gate

    remove(model, family)
    assert total(model) == published.total
    assert family.neurons(model) == f


def total(model: PreTrainedModel) -> int:
    """Parameters; on meta, before filling, a tied head is still a second tensor and is left out."""
    tied = set(model._tied_weights_keys or {}) if model.config.tie_word_embeddings else set()
    return sum(p.numel() for name, p in model.named_parameters() if name not in tied)


def gates(model: PreTrainedModel) -> int:
    """Parameters of the gates: the only ones that surgery leaves trainable."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def trained(model: PreTrainedModel) -> int:
    """Parameters of the gates and of the banks that some pair owns."""
    banks = [bank for _, ffn in routed_ffns(model) for bank in ffn.banks if bank.kind != "frozen"]
    return gates(model) + sum(p.numel() for bank in banks for p in bank.parameters())
