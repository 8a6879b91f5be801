"""Folded and dense exports in CTranslate2: its own converter, our prompts, the tokens that transformers writes."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.checkpoints import LAYERS, PAIRS, recipe_for, write_checkpoint
from support.exports import open_trained
from support.tiny_models import SLIDING, random_model, save
from support.tiny_translator import SPECIAL, WORDS, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen3Config,
)

from lander_ds.cli.main import main
from lander_ds.config.loading import dump_recipe
from lander_ds.config.schema.data import CorpusConfig
from lander_ds.config.schema.method import LayerChoice, SelectConfig
from lander_ds.export.dense import export_dense
from lander_ds.export.fold import folded
from lander_ds.export.routed import export_routed
from lander_ds.export.writer import Form

PROGRAM = Path(__file__).parents[2] / "examples" / "ctranslate2_translate.py"
NEW_TOKENS = 16
LINES = ["w1 w2 w3", "", "w9 w8 w7 w6", "w40 w41 w50 w4 w4 w59", "w12", "w33 w2"]

COMMON: dict[str, Any] = {
    "vocab_size": len(SPECIAL) + len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**COMMON, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**GROUPED),
    "mistral": lambda: MistralConfig(**GROUPED, sliding_window=None),
    "qwen3": lambda: Qwen3Config(**GROUPED, tie_word_embeddings=True),
    "gemma": lambda: GemmaConfig(**GROUPED),
    # As in Gemma 3 of 270 million and of a billion parameters.
    "gemma3": lambda: Gemma3TextConfig(
        **GROUPED, sliding_window=64, layer_types=SLIDING, query_pre_attn_scalar=8
    ),
    "bloom": lambda: BloomConfig(
        **{key: COMMON[key] for key in ("vocab_size", "hidden_size")}, n_layer=3, n_head=4
    ),
    "opt": lambda: OPTConfig(**COMMON, ffn_dim=48, word_embed_proj_dim=32),
}
"""What the converter of CTranslate2 4.8.5 converts rightly, in the form in which the models were published.
(Transformers opens Qwen2 with a tokenizer class that the tiny tokenizer does not fit.)"""


@pytest.fixture(scope="module")
def program() -> ModuleType:
    """The example that docs/serving.md names."""
    pytest.importorskip("ctranslate2")
    spec = importlib.util.spec_from_file_location("ctranslate2_translate", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("case", CONFIGS)
def test_ctranslate2_writes_the_same_tokens(case: str, program: ModuleType, tmp_path: Path) -> None:
    from ctranslate2.converters import TransformersConverter

    base = save(random_model(CONFIGS[case]()), tmp_path / "base")
    tiny_tokenizer().save_pretrained(base)
    plain = recipe_for(base, tmp_path / "run")
    recipe = replace(
        plain,
        data=replace(plain.data, corpora=(CorpusConfig("absent.{pair}.jsonl"),), max_length=48),
        select=SelectConfig(LayerChoice(k=2)),
    )
    write_checkpoint(recipe)
    (tmp_path / "run" / "recipe.resolved.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    source, target = tmp_path / "in.txt", tmp_path / "prompts.json"
    source.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    text = ["translate", "--run", str(tmp_path / "run"), "--pair", "en-de", "--input", str(source)]
    assert main([*text, "--prompts", "--output", str(target)]) == 0
    content = json.loads(target.read_text(encoding="utf-8"))

    means = {str(layer): dict.fromkeys(PAIRS, 0.6) for layer in LAYERS}
    for name, weights in {
        "folded": folded(open_trained(recipe), means, "en-de"),
        "dense": open_trained(recipe).source,
    }.items():
        export_dense(weights, tmp_path / name, Form())
        TransformersConverter(str(tmp_path / name)).convert(str(tmp_path / f"{name}-ct2"))
        written = program.generate(tmp_path / f"{name}-ct2", content, "cpu", "float32", NEW_TOKENS)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        for prompt, ids in zip(content["prompts"], written, strict=True):
            row = torch.tensor([prompt["ids"]])
            output = model.generate(
                row,
                attention_mask=torch.ones_like(row),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=content["end_ids"],
                pad_token_id=0,
            )
            assert ids == output[0, row.shape[1] :].tolist()
        assert len(set(map(tuple, written))) > 1

    out, flags = tmp_path / "out.txt", ["--set", f"translate.max_new_tokens={NEW_TOKENS}"]
    assert main([*text, *flags, "--model", str(tmp_path / "folded"), "--output", str(out)]) == 0
    expected = out.read_text(encoding="utf-8").split("\n")
    written = program.generate(tmp_path / "folded-ct2", content, "cpu", "float32", NEW_TOKENS)
    for prompt, ids in zip(content["prompts"], written, strict=True):
        assert program.text_of(ids, content, tiny_tokenizer()) == expected[prompt["line"] - 1]


@pytest.mark.parametrize(
    ("options", "most"),
    [({"load_in_8bit": True}, 0.15), ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, 0.75)],
    ids=["int8", "nf4"],
)
def test_a_routed_export_is_opened_quantised(options: dict[str, Any], most: float, tmp_path: Path) -> None:
    """Linear layers are quantised; banks and gates, which are none, keep the type that they were trained in."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    # The kernels for CPUs want widths that are multiples of their blocks.
    config = LlamaConfig(**{**COMMON, "hidden_size": 128}, intermediate_size=128)
    recipe = recipe_for(save(random_model(config), tmp_path / "base"), tmp_path / "run")
    write_checkpoint(recipe)
    export_routed(open_trained(recipe), tmp_path / "routed", Form())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "routed", trust_remote_code=True)
    narrow = AutoModelForCausalLM.from_pretrained(
        tmp_path / "routed",
        trust_remote_code=True,
        quantization_config=BitsAndBytesConfig(**options),
        device_map="cpu",
    )
    before, after = dict(plain.named_parameters()), dict(narrow.named_parameters())
    routed = [name for name in before if ".banks." in name or ".router." in name]
    assert routed
    assert all(torch.equal(before[name], after[name]) for name in routed)
    assert all(
        after[f"model.model.layers.{layer}.self_attn.q_proj.weight"].dtype in (torch.int8, torch.uint8)
        for layer in range(3)
    )
    ids = torch.tensor([[5, 9, 30, 12]])
    with torch.no_grad():
        close, exact = (model(ids, pair="en-de").logits.float() for model in (narrow, plain))
        other = narrow(ids, pair="de-en").logits.float()
    distance = float((close - exact).norm() / exact.norm())
    # Random weights are far worse to quantise than trained ones.
    assert 0 < distance < most
    assert not torch.equal(other, close)
