"""The families this project knows, one description each, and `register` for one's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lander_ds.common.errors import ModelError
from lander_ds.models.attention import Segments
from lander_ds.models.bloom_attention import attend_in_examples
from lander_ds.models.family import Family, FFNPaths, LayerArguments

GATED = FFNPaths(
    block="mlp", gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj", activation="mlp.act_fn"
)

FUSED = FFNPaths(
    block="mlp",
    gate="mlp.gate_up_proj",
    up="mlp.gate_up_proj",
    down="mlp.down_proj",
    activation="mlp.activation_fn",
)


EXPERTS = FFNPaths(
    block="mlp.experts",
    gate="mlp.experts.gate_proj",
    up="mlp.experts.up_proj",
    down="mlp.experts.down_proj",
    activation="mlp.experts.act_fn",
)
"""Mixtures of experts, as `models.experts` lays them out."""


def _embed_tokens(decoder: nn.Module, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Token embedding alone; Gemma's scale is inside its embedding module."""
    return decoder.embed_tokens(input_ids)  # type: ignore[operator, no-any-return]


def _rotary(
    decoder: nn.Module, hidden: torch.Tensor, positions: torch.Tensor, segments: Segments
) -> LayerArguments:
    """One rotary embedding for all layers. Each layer knows its own sliding window."""
    shared = {
        "attention_mask": None,
        "position_ids": positions,
        "position_embeddings": decoder.rotary_emb(hidden, positions),  # type: ignore[operator]
        "segments": segments,
    }
    return lambda layer: shared


def _rotary_per_type(
    decoder: nn.Module, hidden: torch.Tensor, positions: torch.Tensor, segments: Segments
) -> LayerArguments:
    """Gemma 3, OLMo 3: sliding and full layers have rotary embeddings of their own."""
    types: list[str] = decoder.config.layer_types  # type: ignore[union-attr, assignment]
    embeddings: dict[str, Any] = {
        kind: decoder.rotary_emb(hidden, positions, kind)  # type: ignore[operator]
        for kind in sorted(set(types))
    }
    shared = {"attention_mask": None, "position_ids": positions, "segments": segments}
    return lambda layer: {**shared, "position_embeddings": embeddings[types[layer]]}


def _embed_granite(decoder: nn.Module, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return decoder.embed_tokens(input_ids) * decoder.config.embedding_multiplier  # type: ignore[operator, union-attr, no-any-return]


def _embed_bloom(decoder: nn.Module, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return decoder.word_embeddings_layernorm(decoder.word_embeddings(input_ids))  # type: ignore[operator, no-any-return]


def _alibi(
    decoder: nn.Module, hidden: torch.Tensor, positions: torch.Tensor, segments: Segments
) -> LayerArguments:
    """BLOOM: ALiBi by its slopes, the examples in place of a mask."""
    attend_in_examples(decoder)
    # At position 1 a slope's bias is the slope.
    two = torch.ones(1, 2, device=hidden.device)
    slopes = decoder.build_alibi_tensor(two, decoder.num_heads, torch.float32)[:, 0, 1]  # type: ignore[operator]
    shared = {"alibi": slopes, "attention_mask": segments}
    return lambda layer: shared


def _embed_neox(decoder: nn.Module, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return decoder.emb_dropout(decoder.embed_in(input_ids))  # type: ignore[operator, no-any-return]


def _embed_opt(decoder: nn.Module, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    hidden = decoder.embed_tokens(input_ids)  # type: ignore[operator]
    if decoder.project_in is not None:
        hidden = decoder.project_in(hidden)  # type: ignore[operator]
    mask = torch.ones_like(input_ids)
    return hidden + decoder.embed_positions(mask, 0, position_ids=positions)  # type: ignore[operator, no-any-return]


def _learned_positions(
    decoder: nn.Module, hidden: torch.Tensor, positions: torch.Tensor, segments: Segments
) -> LayerArguments:
    """OPT: positions are in the embedding already."""
    shared = {"attention_mask": None, "segments": segments}
    return lambda layer: shared


def _llama_like(name: str, *model_types: str, **different: Any) -> Family:
    """A family of the LLaMA class; `different` says in what it is not."""
    plain: dict[str, Any] = {"ffn": GATED, "embed": _embed_tokens, "layer_arguments": _rotary}
    return Family(
        name=name,
        model_types=model_types,
        decoder="model",
        embeddings="embed_tokens",
        layers="layers",
        final=("norm",),
        **plain | different,
    )


_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Add a family, or replace the one of the same name."""
    _FAMILIES[family.name] = family


def family_of(model_type: str) -> Family:
    """The family of an HF `model_type`.

    Raises:
        ModelError: no description fits; the message lists the known ones.
    """
    for family in _FAMILIES.values():
        if model_type in family.model_types:
            return family
    known = ", ".join(sorted(kind for family in _FAMILIES.values() for kind in family.model_types))
    raise ModelError(
        f"model_type {model_type!r} is of no known family (known: {known}). "
        "Describe it with lander_ds.models.catalogue.register(Family(...)); see CONTRIBUTING.md"
    )


def families() -> tuple[Family, ...]:
    """All known families."""
    return tuple(_FAMILIES.values())


for _family in (
    _llama_like("gemma3", "gemma3_text", layer_arguments=_rotary_per_type),
    _llama_like("gemma2", "gemma2"),
    _llama_like("gemma", "gemma"),
    _llama_like("llama", "llama"),
    _llama_like("mistral", "mistral"),
    _llama_like("qwen2", "qwen2"),
    _llama_like("qwen3", "qwen3"),
    _llama_like("ministral", "ministral"),
    _llama_like("smollm3", "smollm3"),
    _llama_like("hunyuan", "hunyuan_v1_dense"),
    _llama_like("seed_oss", "seed_oss"),
    _llama_like("phi3", "phi3", ffn=FUSED),
    _llama_like("glm", "glm", "glm4", ffn=FUSED),
    _llama_like("olmo2", "olmo2"),
    _llama_like("olmo3", "olmo3", layer_arguments=_rotary_per_type),
    _llama_like("cohere", "cohere", "cohere2", logit_factor=lambda config: float(config.logit_scale)),
    _llama_like(
        "granite",
        "granite",
        embed=_embed_granite,
        logit_factor=lambda config: 1 / float(config.logits_scaling),
    ),
    _llama_like("qwen3_moe", "qwen3_moe", ffn=EXPERTS),
    _llama_like("mixtral", "mixtral", ffn=EXPERTS, renamed=((".mlp.", ".block_sparse_moe."),)),
    Family(
        name="bloom",
        model_types=("bloom",),
        decoder="transformer",
        embeddings="word_embeddings",
        layers="h",
        final=("ln_f",),
        ffn=FFNPaths(up="mlp.dense_h_to_4h", activation="mlp.gelu_impl", down="mlp.dense_4h_to_h"),
        embed=_embed_bloom,
        layer_arguments=_alibi,
        packed_attention=False,
    ),
    Family(
        name="gpt_neox",
        model_types=("gpt_neox",),
        decoder="gpt_neox",
        embeddings="embed_in",
        layers="layers",
        final=("final_layer_norm",),
        ffn=FFNPaths(block="mlp", up="mlp.dense_h_to_4h", activation="mlp.act", down="mlp.dense_4h_to_h"),
        embed=_embed_neox,
        layer_arguments=_rotary,
        renamed=(("lm_head.", "embed_out."),),
    ),
    Family(
        name="opt",
        model_types=("opt",),
        decoder="model.decoder",
        embeddings="embed_tokens",
        layers="layers",
        final=("final_layer_norm", "project_out"),
        ffn=FFNPaths(up="fc1", activation="activation_fn", down="fc2"),
        embed=_embed_opt,
        layer_arguments=_learned_positions,
    ),
):
    register(_family)
