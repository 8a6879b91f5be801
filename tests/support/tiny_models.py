"""Tiny models of every family, with random values everywhere: in norms, biases and tied embeddings too."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    GlmConfig,
    GPTNeoXConfig,
    GraniteConfig,
    HunYuanDenseV1Config,
    LlamaConfig,
    MinistralConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
    SmolLM3Config,
)

from lander_ds.models.experts import unstack

VOCABULARY = 97
HIDDEN = 32
WINDOW = 4
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**COMMON, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 12}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "gemma3": lambda: Gemma3TextConfig(
        **GROUPED,
        sliding_window=WINDOW,
        layer_types=SLIDING,
        query_pre_attn_scalar=10,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
    "gemma": lambda: GemmaConfig(**GROUPED),
    "gemma2": lambda: Gemma2Config(
        **GROUPED,
        sliding_window=WINDOW,
        layer_types=SLIDING,
        query_pre_attn_scalar=10,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=1.5,
    ),
    "llama": lambda: LlamaConfig(**GROUPED, attention_bias=True),
    "llama-tied": lambda: LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**GROUPED, sliding_window=WINDOW),
    "qwen2": lambda: Qwen2Config(
        **{key: value for key, value in GROUPED.items() if key != "head_dim"},
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=1,
    ),
    "qwen3": lambda: Qwen3Config(**GROUPED, tie_word_embeddings=True),
    "ministral": lambda: MinistralConfig(**GROUPED, sliding_window=WINDOW, layer_types=SLIDING),
    "smollm3": lambda: SmolLM3Config(
        **{key: value for key, value in GROUPED.items() if key != "head_dim"},
        no_rope_layers=[1, 0, 1],
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=SLIDING,
    ),
    "hunyuan": lambda: HunYuanDenseV1Config(**GROUPED),
    "seed_oss": lambda: SeedOssConfig(**GROUPED),
    "olmo2": lambda: Olmo2Config(**{key: value for key, value in GROUPED.items() if key != "head_dim"}),
    "olmo3": lambda: Olmo3Config(
        **{key: value for key, value in GROUPED.items() if key != "head_dim"},
        sliding_window=WINDOW,
        layer_types=SLIDING,
    ),
    "cohere": lambda: CohereConfig(
        **{key: value for key, value in GROUPED.items() if key != "head_dim"},
        use_qk_norm=True,
        logit_scale=0.25,
    ),
    "cohere-2": lambda: Cohere2Config(**GROUPED, sliding_window=WINDOW, layer_types=SLIDING, logit_scale=0.3),
    "granite": lambda: GraniteConfig(
        **{key: value for key, value in GROUPED.items() if key != "head_dim"},
        embedding_multiplier=3.0,
        logits_scaling=2.0,
        residual_multiplier=0.7,
        attention_multiplier=0.4,
    ),
    "phi3": lambda: Phi3Config(
        **{key: value for key, value in GROUPED.items() if key != "head_dim"},
        sliding_window=WINDOW,
        resid_pdrop=0.1,
    ),
    "glm": lambda: GlmConfig(**GROUPED, attention_bias=True),
    "glm-4": lambda: Glm4Config(**GROUPED, attention_bias=True),
    "qwen3-moe": lambda: Qwen3MoeConfig(
        **GROUPED, moe_intermediate_size=12, num_experts=6, num_experts_per_tok=2, norm_topk_prob=True
    ),
    "mixtral-moe": lambda: MixtralConfig(
        **{**GROUPED, "intermediate_size": 16},
        num_local_experts=4,
        num_experts_per_tok=2,
        router_jitter_noise=0.1,
    ),
    "bloom": lambda: BloomConfig(
        vocab_size=VOCABULARY,
        hidden_size=36,
        n_layer=3,
        n_head=6,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    "bloom-post": lambda: BloomConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        n_layer=3,
        n_head=4,
        apply_residual_connection_post_layernorm=True,
        tie_word_embeddings=False,
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**COMMON, intermediate_size=48, rotary_pct=0.5),
    "gpt_neox-serial": lambda: GPTNeoXConfig(
        **COMMON, intermediate_size=48, use_parallel_residual=False, tie_word_embeddings=True
    ),
    "opt": lambda: OPTConfig(**COMMON, ffn_dim=48, word_embed_proj_dim=HIDDEN, dropout=0.1),
    "opt-350m": lambda: OPTConfig(
        **COMMON, ffn_dim=48, word_embed_proj_dim=20, do_layer_norm_before=False, dropout=0.1, layerdrop=0.5
    ),
}
"""By case: one family each, or a second form of it. OPT has dropout, which `build` must switch off."""

ALIKE = ("ministral", "seed_oss", "hunyuan", "smollm3", "olmo2", "olmo3", "glm", "glm-4")
"""Cases that differ from others in attention and norms alone: FFNs, heads and embeddings are those of `llama` or `phi3`."""
DIFFERENT = tuple(case for case in CONFIGS if case not in ALIKE)
PLAIN = ("bloom", "gpt_neox", "opt")
GATED = tuple(case for case in CONFIGS if not case.startswith(PLAIN))


def tiny_model(case: str, attention: str = "eager") -> PreTrainedModel:
    """A float32 model in evaluation mode; the same weights every time."""
    return random_model(CONFIGS[case](), attention)


def random_model(config: PretrainedConfig, attention: str = "eager") -> PreTrainedModel:
    """That of a configuration."""
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=attention
    ).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:
                parameter.copy_(noise * 0.2)
            elif "norm" in name or "ln_f" in name:
                parameter.add_(noise * 0.3)
            else:
                parameter.copy_(noise * 0.3)
    return model


def laid_out(case: str) -> PreTrainedModel:
    """The same model with experts side by side, as `build` makes it."""
    model = tiny_model(case)
    unstack(model)
    return model


def save(model: PreTrainedModel, directory: Path, **options: Any) -> Path:
    """Write an HF model directory and return it."""
    model.save_pretrained(directory, **options)
    return directory


def save_roomy(directory: Path) -> Path:
    """A model with enough layers and positions for the recipes of real ones; returns its directory."""
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, n_layer=6, n_head=4)
    return save(AutoModelForCausalLM.from_config(config, dtype=torch.float32), directory)


@cache
def examples() -> tuple[torch.Tensor, ...]:
    """Three token sequences [length], two of them longer than the sliding windows."""
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randint(3, VOCABULARY, (length,), generator=generator) for length in (9, 3, 14))
